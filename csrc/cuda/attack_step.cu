// One step of projected gradient ascent. Linf is one elementwise pass; L2 gives each example to one
// block. Every kernel only launches on the caller's stream, so it can be captured in a CUDA graph.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>

#include "../kernels.h"
#include "../math.h"
#include "launch.cuh"

namespace fastinterp {
namespace cuda {
namespace {

constexpr int kLinfThreads = 256;
constexpr int kLinfVectors = 2;  // per thread and tensor: six independent loads in flight
constexpr int kL2Threads = 1024;
constexpr int kVectorBytes = 16;

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T values[kWidth];
};

// The pointers are not __restrict__: out may be x (an in-place step), or origin may be x. Every
// element is written by the thread that read it, after its last read.
template <typename T>
struct Step {
  std::int64_t examples, inner;
  const T* x;  // (examples, inner), as grad, origin and out
  const T* grad;
  const T* origin;
  T* out;
  const acc_t<T>* eps;  // one value, or one per example when the stride is 1
  const acc_t<T>* step_size;
  std::int64_t eps_stride, step_stride;
  acc_t<T> clip_min, clip_max;
};

__device__ constexpr float smallest_normal(float) { return FLT_MIN; }
__device__ constexpr double smallest_normal(double) { return DBL_MIN; }

template <int kWidth, typename T>
__device__ Vector<T, kWidth> load(const T* p, std::int64_t vector) {
  return reinterpret_cast<const Vector<T, kWidth>*>(p)[vector];
}

template <int kWidth, typename T>
__device__ void store(T* p, std::int64_t vector, const Vector<T, kWidth>& v) {
  reinterpret_cast<Vector<T, kWidth>*>(p)[vector] = v;
}

// Each of the `chunks` blocks of an example handles kLinfVectors * blockDim.x vectors. With
// kWidth > 1 every example starts on a vector boundary; only a single example may end off one.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kLinfThreads) linf_kernel(const Step<T> s, std::int64_t chunks) {
  using A = acc_t<T>;
  const std::int64_t vectors = s.inner / kWidth;
  for (std::int64_t b = blockIdx.x; b < s.examples * chunks; b += gridDim.x) {
    const std::int64_t n = b / chunks, chunk = b % chunks;
    const A eps = s.eps[n * s.eps_stride], step = s.step_size[n * s.step_stride];
    const T* x = s.x + n * s.inner;
    const T* grad = s.grad + n * s.inner;
    const T* origin = s.origin + n * s.inner;
    T* out = s.out + n * s.inner;
    const std::int64_t first = chunk * kLinfVectors * blockDim.x + threadIdx.x;
    Vector<T, kWidth> xs[kLinfVectors], g[kLinfVectors], o[kLinfVectors];
#pragma unroll
    for (int j = 0; j < kLinfVectors; ++j) {
      const std::int64_t v = first + j * blockDim.x;
      if (v < vectors) {
        xs[j] = load<kWidth>(x, v);
        g[j] = load<kWidth>(grad, v);
        o[j] = load<kWidth>(origin, v);
      }
    }
    // clip(clamp(x + s sign(g), o - eps, o + eps))
#pragma unroll
    for (int j = 0; j < kLinfVectors; ++j) {
      const std::int64_t v = first + j * blockDim.x;
      if (v < vectors) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          xs[j].values[i] = static_cast<T>(linf_step<A>(
              static_cast<A>(xs[j].values[i]), static_cast<A>(g[j].values[i]),
              static_cast<A>(o[j].values[i]), eps, step, s.clip_min, s.clip_max));
        }
        store(out, v, xs[j]);
      }
    }
    if (kWidth > 1 && chunk == 0) {
      const std::int64_t i = vectors * kWidth + threadIdx.x;  // fewer than kWidth elements
      if (i < s.inner) {
        out[i] = static_cast<T>(linf_step<A>(static_cast<A>(x[i]), static_cast<A>(grad[i]),
                                             static_cast<A>(origin[i]), eps, step, s.clip_min,
                                             s.clip_max));
      }
    }
  }
}

struct Sum {
  template <typename A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};
struct Max {  // a NaN in b is passed over
  template <typename A>
  __device__ A operator()(A a, A b) const {
    return b > a ? b : a;
  }
};

// Combines one value >= 0 per thread; every thread gets the same result, and the order of the
// operations is fixed. blockDim.x is a multiple of the warp size.
template <typename A, typename Combine>
__device__ A block_reduce(A v, Combine combine) {
  __shared__ A partial[kL2Threads / kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    v = combine(v, __shfl_xor_sync(0xffffffffu, v, offset));
  }
  __syncthreads();  // the partials of an earlier call may still be read
  if (lane == 0) partial[warp] = v;
  __syncthreads();
  v = lane < static_cast<int>(blockDim.x) / kWarp ? partial[lane] : A(0);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    v = combine(v, __shfl_xor_sync(0xffffffffu, v, offset));
  }
  return v;
}

// y = x + s g/|g|,  out = clip(o + (y - o) min(1, eps/|y - o|)); lengths are over one example.
// Examples that fit in the caches are read from device memory once.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kL2Threads) l2_kernel(const Step<T> s) {
  using A = acc_t<T>;
  const std::int64_t vectors = s.inner / kWidth;  // kWidth divides inner
  for (std::int64_t n = blockIdx.x; n < s.examples; n += gridDim.x) {
    const T* x = s.x + n * s.inner;
    const T* grad = s.grad + n * s.inner;
    const T* origin = s.origin + n * s.inner;
    T* out = s.out + n * s.inner;
    const A eps = s.eps[n * s.eps_stride], step = s.step_size[n * s.step_stride];

    // Gradients of a mean loss are often near 1e-20: their squares underflow, so divide by the
    // largest first. Subnormal gradients have no usable direction and count as zero.
    A largest = 0;
#pragma unroll 4
    for (std::int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
      const Vector<T, kWidth> g = load<kWidth>(grad, v);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const A value = static_cast<A>(g.values[i]);
        largest = Max()(largest, value < 0 ? -value : value);
      }
    }
    largest = block_reduce(largest, Max());
    const A down = largest >= smallest_normal(A()) ? A(1) / largest : A(0);

    A square = 0;
#pragma unroll 4
    for (std::int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
      const Vector<T, kWidth> g = load<kWidth>(grad, v);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const A value = static_cast<A>(g.values[i]) * down;
        square += value * value;
      }
    }
    const A scale = unit_scale<A>(root(block_reduce(square, Sum())), step);

    A distance = 0;
#pragma unroll 2
    for (std::int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
      const Vector<T, kWidth> xs = load<kWidth>(x, v), g = load<kWidth>(grad, v),
                              o = load<kWidth>(origin, v);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const A d = static_cast<A>(xs.values[i]) + scale * (static_cast<A>(g.values[i]) * down) -
                    static_cast<A>(o.values[i]);
        distance += d * d;
      }
    }
    const A shrink = ball_scale<A>(root(block_reduce(distance, Sum())), eps);

    for (std::int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
      Vector<T, kWidth> xs = load<kWidth>(x, v);
      const Vector<T, kWidth> g = load<kWidth>(grad, v), origins = load<kWidth>(origin, v);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const A o = static_cast<A>(origins.values[i]);
        const A d = static_cast<A>(xs.values[i]) + scale * (static_cast<A>(g.values[i]) * down) - o;
        xs.values[i] = static_cast<T>(clamp<A>(o + shrink * d, s.clip_min, s.clip_max));
      }
      store(out, v, xs);
    }
  }
}

bool aligned(const AttackStep& p) {
  const std::uintptr_t addresses =
      reinterpret_cast<std::uintptr_t>(p.x) | reinterpret_cast<std::uintptr_t>(p.grad) |
      reinterpret_cast<std::uintptr_t>(p.origin) | reinterpret_cast<std::uintptr_t>(p.out);
  return addresses % kVectorBytes == 0;
}

template <typename T, int kWidth>
void launch_linf(const Step<T>& s, cudaStream_t stream) {
  const std::int64_t vectors = s.inner / kWidth;
  const unsigned threads = block_size((vectors + kLinfVectors - 1) / kLinfVectors, kLinfThreads);
  const std::int64_t per_block = kLinfVectors * threads;
  const std::int64_t chunks = vectors > per_block ? (vectors + per_block - 1) / per_block : 1;
  launch(linf_kernel<T, kWidth>, grid_size(s.examples * chunks), threads, stream, s, chunks);
}

template <typename T, int kWidth>
void launch_l2(const Step<T>& s, cudaStream_t stream) {
  const unsigned threads = block_size(s.inner / kWidth, kL2Threads);
  launch(l2_kernel<T, kWidth>, grid_size(s.examples), threads, stream, s);
}

template <typename T>
void run(const AttackStep& p, cudaStream_t stream) {
  using A = acc_t<T>;
  constexpr int kWidth = kVectorBytes / sizeof(T);
  Step<T> s{p.examples,
            p.inner,
            static_cast<const T*>(p.x),
            static_cast<const T*>(p.grad),
            static_cast<const T*>(p.origin),
            static_cast<T*>(p.out),
            static_cast<const A*>(p.eps),
            static_cast<const A*>(p.step_size),
            p.eps_stride,
            p.step_stride,
            static_cast<A>(p.clip_min),
            static_cast<A>(p.clip_max)};
  if (p.norm == StepNorm::linf) {
    if (s.eps_stride == 0 && s.step_stride == 0) {  // no boundaries between examples
      s.inner *= s.examples;
      s.examples = 1;
    }
    const bool vectors = aligned(p) && (s.examples == 1 || s.inner % kWidth == 0);
    vectors ? launch_linf<T, kWidth>(s, stream) : launch_linf<T, 1>(s, stream);
  } else {
    const bool vectors = aligned(p) && s.inner % kWidth == 0;
    vectors ? launch_l2<T, kWidth>(s, stream) : launch_l2<T, 1>(s, stream);
  }
}

}  // namespace

int attack_step(const AttackStep& p, void* stream) {
  if (p.examples * p.inner == 0) return cudaSuccess;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32:
      run<float>(p, s);
      break;
    case DType::f64:
      run<double>(p, s);
      break;
    case DType::bf16:
      run<__nv_bfloat16>(p, s);
      break;
    case DType::f16:
      run<__half>(p, s);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  // Also reports, and clears, an error that an earlier call left behind.
  return cudaGetLastError();
}

const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace cuda
}  // namespace fastinterp
