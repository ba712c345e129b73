// Batch norm + residual + activation and its first two derivatives; formulas in ../batch_norm.h. An
// order is at most three kernels: partial sums over chunks of the tensor, their totals made into a few
// values per channel, and one pass that applies these. No atomics: results repeat bit for bit.
// Where launch bounds ask for one block, ptxas would else spill to save a few registers.
#include "../activations.h"
#include "../batch_norm.h"
#include "channel_tiles.cuh"

namespace fastinterp {
namespace cuda {
namespace {

// Pieces of every tensor in flight in a thread; one where two would take registers that are not there.
template <typename T>
constexpr int kBatch = sizeof(T) == 8 ? 1 : 2;

// The activation, for a tensor whose z is at hand. The piecewise linear ones share kernels, which
// are told which of the three it is: nothing beside their memory traffic.
template <Activation K, typename A>
struct Phi {
  static constexpr bool smooth = is_smooth<K>;
  Activation kind;
  A alpha;

  __device__ __forceinline__ A value(A z) const {
    if constexpr (smooth) {
      return activation_value<K>(z, alpha);
    } else if (kind == Activation::relu) {
      return activation_value<Activation::relu>(z, alpha);
    } else if (kind == Activation::leaky_relu) {
      return activation_value<Activation::leaky_relu>(z, alpha);
    } else {
      return z;
    }
  }
  // phi'(z) v, where z may be only a sign
  __device__ __forceinline__ A times_slope(A z, A v) const {
    if constexpr (smooth) {
      return activation_slope<K>(z, alpha) * v;
    } else if (kind == Activation::relu) {
      return gated<Activation::relu>(z > A(0), v, alpha);
    } else if (kind == Activation::leaky_relu) {
      return gated<Activation::leaky_relu>(z > A(0), v, alpha);
    } else {
      return v;
    }
  }
  __device__ __forceinline__ A curvature(A z) const { return activation_curvature<K>(z, alpha); }
};

// The values of this thread's lanes, and what a piece's elements are made of.
template <typename T, Activation K, bool kLast>
struct Norm {
  using A = acc_t<T>;
  static constexpr int width = kWidth<T>, lanes = kLanes<T, kLast>;
  Phi<K, A> phi;
  A mean[lanes], rstd[lanes], scale[lanes], bias[lanes];

  __device__ Norm(const BatchNormAct& p, const Cut& c, bool from_running)
      : phi{p.activation, static_cast<A>(p.alpha)} {
#pragma unroll
    for (int i = 0; i < lanes; ++i) mean[i] = rstd[i] = scale[i] = bias[i] = A(0);
    each_lane<T, kLast>(c, [&](int i, std::int64_t channel) {
      if (from_running) {
        mean[i] = value_at(p.running_mean, channel, A(0));
        rstd[i] = A(1) / root(static_cast<A>(value_at(p.running_var, channel, A(0)) + p.eps));
      } else {
        mean[i] = value_at(p.mean, channel, A(0));
        rstd[i] = value_at(p.rstd, channel, A(0));
      }
      scale[i] = value_at(p.weight, channel, A(1)) * rstd[i];
      bias[i] = value_at(p.bias, channel, A(0));
    });
  }
  // Of element i of a piece.
  static __device__ __forceinline__ int lane(int i) { return kLast ? i : 0; }
  static __device__ __forceinline__ A number(const Piece<T>& piece, int i) {
    return static_cast<A>(piece.values[i]);
  }
  __device__ __forceinline__ A centred(const Piece<T>& x, int i) const {
    return number(x, i) - mean[lane(i)];
  }
};

// The loads of a piece of what the backward passes are made of.
template <typename T, Activation K, bool kLast>
struct Given {
  using A = acc_t<T>;
  using N = Norm<T, K, kLast>;
  Place at;
  Piece<T> x, residual, gy;
  unsigned bits;

  __device__ __forceinline__ void load_from(const BatchNormAct& p, const Cut& c, std::int64_t item,
                                            std::int64_t end) {
    at = place<T, kLast>(c, item, end);
    x = load<T>(p.x, at, c.aligned);
    gy = load<T>(p.gy, at, c.aligned);
    if constexpr (is_smooth<K>) {
      residual = load<T>(p.residual, at, c.aligned);
    } else {
      bits = p.mask == nullptr ? 0 : load_bits<T>(p.mask, at);
    }
  }
  // z, or its sign where the mask has it
  __device__ __forceinline__ A z(const BatchNormAct& p, const N& n, int i) const {
    if constexpr (!is_smooth<K>) {
      if (p.mask != nullptr) return bits >> i & 1 ? A(1) : A(0);
    }
    const A z = n.centred(x, i) * n.scale[n.lane(i)] + n.bias[n.lane(i)];
    if constexpr (is_smooth<K>) return z + n.number(residual, i);
    return z;
  }
};

// ---- forward

template <typename T, bool kLast>
__global__ void __launch_bounds__(kThreads, 1)
    statistics_kernel(const BatchNormAct p, const Cut c, void* partial) {
  using A = acc_t<T>;
  constexpr int lanes = kLanes<T, kLast>;
  A pivot[lanes] = {}, sum[2][lanes] = {};
  each_lane<T, kLast>(c, [&](int i, std::int64_t channel) { pivot[i] = pivot_of<T>(p, channel); });
  constexpr int batch = 2 * kBatch<T>;
  each_item<kLast, batch>(c, [&](std::int64_t item, std::int64_t end) {
    Place at[batch];
    Piece<T> x[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      at[b] = place<T, kLast>(c, item + b * c.per_tile, end);
      x[b] = load<T>(p.x, at[b], c.aligned);
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) {
        const int lane = kLast ? i : 0;
        const A d = i < at[b].count ? static_cast<A>(x[b].values[i]) - pivot[lane] : A(0);
        sum[0][lane] += d;
        sum[1][lane] += d * d;
      }
    }
  });
  store_sums<T, kLast>(c, sum, partial);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    statistics_totals_kernel(const BatchNormAct p, const void* partial, std::int64_t parts) {
  using A = acc_t<T>;
  double total[2];
  totals_of<A>(partial, parts, p.channels, total);
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kChannels + threadIdx.x;
  if (threadIdx.x >= kChannels || c >= p.channels) return;
  const NormStatistics of = norm_statistics(pivot_of<T>(p, c), total[0], total[1],
                                            static_cast<double>(p.examples * p.pixels));
  static_cast<A*>(p.mean)[c] = static_cast<A>(of.mean);
  static_cast<A*>(p.rstd)[c] = A(1) / root(static_cast<A>(of.var + p.eps));
  static_cast<A*>(p.unbiased_var)[c] = static_cast<A>(of.unbiased_var);
}

template <typename T, Activation K, bool kLast>
__global__ void __launch_bounds__(kThreads) forward_kernel(const BatchNormAct p, const Cut c) {
  using A = acc_t<T>;
  constexpr int batch = kBatch<T>;
  const Norm<T, K, kLast> n(p, c, !p.training);
  if (!p.training && blockIdx.y == 0) {  // threads of one lane write the same
    each_lane<T, kLast>(c, [&](int i, std::int64_t channel) {
      static_cast<A*>(p.mean)[channel] = n.mean[i];
      static_cast<A*>(p.rstd)[channel] = n.rstd[i];
    });
  }
  each_item<kLast, batch>(c, [&](std::int64_t item, std::int64_t end) {
    Place at[batch];
    Piece<T> x[batch], residual[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      at[b] = place<T, kLast>(c, item + b * c.per_tile, end);
      x[b] = load<T>(p.x, at[b], c.aligned);
      residual[b] = load<T>(p.residual, at[b], c.aligned);
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) {
        const A z = n.centred(x[b], i) * n.scale[n.lane(i)] + n.bias[n.lane(i)] +
                    n.number(residual[b], i);
        if (i < at[b].count && z > A(0)) bits |= 1u << i;
        x[b].values[i] = static_cast<T>(n.phi.value(z));
      }
      store(p.y, at[b], x[b], c.aligned);
      if (p.mask != nullptr) store_bits<T>(p.mask, at[b], bits);
    }
  });
}

// ---- backward

enum { kConstant, kByD, kFirstValues };
enum { kQConstant, kQD, kSecondConstant, kSecondByD, kByV, kByG, kSecondValues };

template <typename T, Activation K, bool kLast>
__global__ void __launch_bounds__(kThreads)
    backward_sums_kernel(const BatchNormAct p, const Cut c, void* partial) {
  using A = acc_t<T>;
  constexpr int batch = kBatch<T>;
  const Norm<T, K, kLast> n(p, c, false);
  A sum[2][kLanes<T, kLast>] = {};
  each_item<kLast, batch>(c, [&](std::int64_t item, std::int64_t end) {
    Given<T, K, kLast> given[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) given[b].load_from(p, c, item + b * c.per_tile, end);
#pragma unroll
    for (int b = 0; b < batch; ++b) {
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) {
        const int lane = n.lane(i);
        const A g = n.phi.times_slope(given[b].z(p, n, i), n.number(given[b].gy, i));
        sum[0][lane] += g;
        sum[1][lane] += g * (n.centred(given[b].x, i) * n.rstd[lane]);
      }
    }
  });
  store_sums<T, kLast>(c, sum, partial);
}

// values (kFirstValues, channels), or null
template <typename A>
__global__ void __launch_bounds__(kThreads)
    backward_totals_kernel(const BatchNormAct p, const void* partial, std::int64_t parts,
                           void* values) {
  double total[2];
  totals_of<A>(partial, parts, p.channels, total);
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kChannels + threadIdx.x;
  if (threadIdx.x >= kChannels || c >= p.channels) return;
  if (p.gbias != nullptr) static_cast<A*>(p.gbias)[c] = static_cast<A>(total[0]);
  if (p.gweight != nullptr) static_cast<A*>(p.gweight)[c] = static_cast<A>(total[1]);
  if (values == nullptr) return;
  const double rstd = value_at(p.rstd, c, A(0)), scale = value_at(p.weight, c, A(1)) * rstd;
  const std::int64_t count = p.examples * p.pixels;
  const NormBackward by =
      norm_backward(scale, rstd, total[0], total[1], 1.0 / static_cast<double>(count > 0 ? count : 1));
  static_cast<A*>(values)[kConstant * p.channels + c] = static_cast<A>(by.constant);
  static_cast<A*>(values)[kByD * p.channels + c] = static_cast<A>(by.by_d);
}

template <typename T, Activation K, bool kLast>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const BatchNormAct p, const Cut c, const void* values) {
  using A = acc_t<T>;
  constexpr int batch = kBatch<T>;
  constexpr int lanes = kLanes<T, kLast>;
  const Norm<T, K, kLast> n(p, c, false);
  A constant[lanes] = {}, by_d[lanes] = {};
  if (values != nullptr) {
    each_lane<T, kLast>(c, [&](int i, std::int64_t channel) {
      constant[i] = value_at(values, kConstant * p.channels + channel, A(0));
      by_d[i] = value_at(values, kByD * p.channels + channel, A(0));
    });
  }
  each_item<kLast, batch>(c, [&](std::int64_t item, std::int64_t end) {
    Given<T, K, kLast> given[batch];
    Piece<T> addend[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      given[b].load_from(p, c, item + b * c.per_tile, end);
      addend[b] = load<T>(p.addend, given[b].at, c.aligned);
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      Piece<T> gx, gresidual;
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) {
        const int lane = n.lane(i);
        const A g = n.phi.times_slope(given[b].z(p, n, i), n.number(given[b].gy, i));
        gresidual.values[i] = static_cast<T>(g);
        gx.values[i] = static_cast<T>(n.scale[lane] * g + constant[lane] +
                                      by_d[lane] * n.centred(given[b].x, i) +
                                      n.number(addend[b], i));
      }
      store(p.gresidual, given[b].at, gresidual, c.aligned);
      store(p.gx, given[b].at, gx, c.aligned);
    }
  });
}

// ---- backward of the backward

template <typename T, Activation K, bool kLast>
__global__ void __launch_bounds__(kThreads, 1)
    second_sums_kernel(const BatchNormAct p, const Cut c, void* partial) {
  using A = acc_t<T>;
  constexpr bool smooth = is_smooth<K>;
  constexpr int sums = smooth ? kSumsSmooth : kSumsPiecewise, batch = smooth ? 1 : kBatch<T>;
  const Norm<T, K, kLast> n(p, c, false);
  A sum[sums][kLanes<T, kLast>] = {};
  each_item<kLast, batch>(c, [&](std::int64_t item, std::int64_t end) {
    Given<T, K, kLast> given[batch];
    Piece<T> v[batch], u[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      given[b].load_from(p, c, item + b * c.per_tile, end);
      v[b] = load<T>(p.v, given[b].at, c.aligned);
      if constexpr (smooth) u[b] = load<T>(p.u, given[b].at, c.aligned);
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) {
        const int lane = n.lane(i);
        const A gy = n.number(given[b].gy, i), z = given[b].z(p, n, i);
        A term[sums] = {}, w = 0, uj = 0;
        if constexpr (smooth) {
          w = n.phi.curvature(z) * gy;
          uj = n.number(u[b], i);
        }
        add_second_terms<smooth, A>(term, n.centred(given[b].x, i) * n.rstd[lane],
                                    n.number(v[b], i), n.phi.times_slope(z, gy), uj, w);
#pragma unroll
        for (int s = 0; s < sums; ++s) sum[s][lane] += term[s];
      }
    }
  });
  store_sums<T, kLast>(c, sum, partial);
}

// values (kSecondValues, channels); partial is null where no sums are needed
template <typename A, bool kSmooth>
__global__ void __launch_bounds__(kThreads)
    second_totals_kernel(const BatchNormAct p, const void* partial, std::int64_t parts,
                         void* values) {
  double total[kSmooth ? kSumsSmooth : kSumsPiecewise];
  totals_of<A>(partial, parts, p.channels, total);
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kChannels + threadIdx.x;
  if (threadIdx.x >= kChannels || c >= p.channels) return;
  const double rstd = value_at(p.rstd, c, A(0));
  const std::int64_t count = p.examples * p.pixels;
  NormSecondGiven given{};
  given.scale = value_at(p.weight, c, A(1)) * rstd;
  given.rstd = rstd;
  given.a_weight = value_at(p.a_weight, c, A(0));
  given.a_bias = value_at(p.a_bias, c, A(0));
  given.sum_g = value_at(p.sum_g, c, A(0));
  given.sum_gx = value_at(p.sum_gx, c, A(0));
  given.share = p.training ? 1.0 / static_cast<double>(count > 0 ? count : 1) : 0.0;
  const NormSecond by = norm_second<kSmooth>(given, total);
  if (p.gweight2 != nullptr) static_cast<A*>(p.gweight2)[c] = static_cast<A>(by.gweight);
  if (p.gbias2 != nullptr) static_cast<A*>(p.gbias2)[c] = static_cast<A>(by.gbias);
  A* to = static_cast<A*>(values) + c;
  to[kQConstant * p.channels] = static_cast<A>(by.q_constant);
  to[kQD * p.channels] = static_cast<A>(by.q_d);
  to[kSecondConstant * p.channels] = static_cast<A>(by.constant);
  to[kSecondByD * p.channels] = static_cast<A>(by.by_d);
  to[kByV * p.channels] = static_cast<A>(by.by_v);
  to[kByG * p.channels] = static_cast<A>(by.by_g);
}

template <typename T, Activation K, bool kLast>
__global__ void __launch_bounds__(kThreads, 1)
    second_kernel(const BatchNormAct p, const Cut c, const void* values) {
  using A = acc_t<T>;
  constexpr int lanes = kLanes<T, kLast>, batch = kLast ? 1 : kBatch<T>;
  const Norm<T, K, kLast> n(p, c, false);
  A by[kSecondValues][lanes] = {};
  each_lane<T, kLast>(c, [&](int i, std::int64_t channel) {
#pragma unroll
    for (int k = 0; k < kSecondValues; ++k) {
      by[k][i] = value_at(values, k * p.channels + channel, A(0));
    }
  });
  each_item<kLast, batch>(c, [&](std::int64_t item, std::int64_t end) {
    Given<T, K, kLast> given[batch];
    Piece<T> v[batch], u[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      given[b].load_from(p, c, item + b * c.per_tile, end);
      v[b] = load<T>(p.v, given[b].at, c.aligned);
      u[b] = load<T>(p.u, given[b].at, c.aligned);
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      Piece<T> ggy, gx, gresidual;
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) {
        const int lane = n.lane(i);
        const A d = n.centred(given[b].x, i), gy = n.number(given[b].gy, i);
        const A vi = n.number(v[b], i), z = given[b].z(p, n, i);
        const A q = n.scale[lane] * vi + n.number(u[b], i) + by[kQD][lane] * d + by[kQConstant][lane];
        A second = by[kSecondConstant][lane] + by[kSecondByD][lane] * d + by[kByV][lane] * vi +
                   by[kByG][lane] * n.phi.times_slope(z, gy);
        if constexpr (is_smooth<K>) {
          const A h = n.phi.curvature(z) * gy * q;
          gresidual.values[i] = static_cast<T>(h);
          second += n.scale[lane] * h;
        }
        ggy.values[i] = static_cast<T>(n.phi.times_slope(z, q));
        gx.values[i] = static_cast<T>(second);
      }
      if constexpr (is_smooth<K>) store(p.gresidual2, given[b].at, gresidual, c.aligned);
      store(p.ggy, given[b].at, ggy, c.aligned);
      store(p.gx2, given[b].at, gx, c.aligned);
    }
  });
}

// ---- launches

std::int64_t values_size(const Cut& c) { return ceil_div(kSecondValues * c.channels, 8) * 8; }

template <typename T, Activation K, bool kLast>
struct Run {
  using A = acc_t<T>;
  const BatchNormAct& p;
  const cudaStream_t stream;
  const Cut c;
  const dim3 grid, between;
  const std::int64_t parts;
  A *values, *partial;  // kSecondValues and kSumsSmooth at most

  Run(const BatchNormAct& params, cudaStream_t s)
      : p(params),
        stream(s),
        c(cut_of(params, kWidth<T>)),
        grid(c.blocks, c.chunks),
        between(static_cast<unsigned>(ceil_div(c.channels, kChannels))),
        parts(c.parts(kLast)),
        values(static_cast<A*>(params.scratch)),
        partial(values + values_size(c)) {}

  void forward() const {
    if (p.training) {
      launch(statistics_kernel<T, kLast>, grid, kThreads, stream, p, c, partial);
      launch(statistics_totals_kernel<T>, between, kThreads, stream, p, partial, parts);
    }
    launch(forward_kernel<T, K, kLast>, grid, kThreads, stream, p, c);
  }

  void backward() const {
    void* first = p.training && p.gx != nullptr ? values : nullptr;
    if (first != nullptr || p.gbias != nullptr || p.gweight != nullptr) {
      launch(backward_sums_kernel<T, K, kLast>, grid, kThreads, stream, p, c, partial);
      launch(backward_totals_kernel<A>, between, kThreads, stream, p, partial, parts, first);
    }
    if (p.gx != nullptr || p.gresidual != nullptr) {
      launch(backward_kernel<T, K, kLast>, grid, kThreads, stream, p, c, first);
    }
  }

  void backward_backward() const {
    const bool sums = p.training || p.gweight2 != nullptr || p.gbias2 != nullptr;
    if (sums) launch(second_sums_kernel<T, K, kLast>, grid, kThreads, stream, p, c, partial);
    launch(second_totals_kernel<A, is_smooth<K>>, between, kThreads, stream, p, partial,
           sums ? parts : 0, values);
    if (p.ggy != nullptr || p.gx2 != nullptr || p.gresidual2 != nullptr) {
      launch(second_kernel<T, K, kLast>, grid, kThreads, stream, p, c, values);
    }
  }
};

template <typename T, Activation K, typename F>
void with_layout(const BatchNormAct& p, cudaStream_t stream, F f) {
  p.channels_last ? f(Run<T, K, true>(p, stream)) : f(Run<T, K, false>(p, stream));
}

template <typename T, typename F>
void with_activation(const BatchNormAct& p, cudaStream_t stream, F f) {
  switch (p.activation) {
    case Activation::softplus:
      return with_layout<T, Activation::softplus>(p, stream, f);
    case Activation::silu:
      return with_layout<T, Activation::silu>(p, stream, f);
    case Activation::gelu:
      return with_layout<T, Activation::gelu>(p, stream, f);
    default:  // a piecewise linear one
      return with_layout<T, Activation::leaky_relu>(p, stream, f);
  }
}

// Calls f(Run); elements and items are numbered in 32 bits.
template <typename F>
int with_run(const BatchNormAct& p, void* stream, F f) {
  if (p.channels == 0) return cudaSuccess;
  if (p.examples * (p.pixels + 8) > kMaxGrid || p.examples * p.channels > kMaxGrid) {
    return cudaErrorInvalidValue;
  }
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32:
      with_activation<float>(p, s, f);
      break;
    case DType::f64:
      with_activation<double>(p, s, f);
      break;
    case DType::bf16:
      with_activation<__nv_bfloat16>(p, s, f);
      break;
    case DType::f16:
      with_activation<__half>(p, s, f);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

std::int64_t batch_norm_act_scratch_bytes(const BatchNormAct& p) {
  if (p.channels == 0) return 0;
  const bool wide = p.dtype == DType::f64;
  const Cut c = cut_of(p, wide ? 2 : p.dtype == DType::f32 ? 4 : 8);
  return (values_size(c) + kSumsSmooth * c.parts(p.channels_last) * c.channels) * (wide ? 8 : 4);
}

int batch_norm_act_forward(const BatchNormAct& p, void* stream) {
  return with_run(p, stream, [](auto run) { run.forward(); });
}
int batch_norm_act_backward(const BatchNormAct& p, void* stream) {
  return with_run(p, stream, [](auto run) { run.backward(); });
}
int batch_norm_act_backward_backward(const BatchNormAct& p, void* stream) {
  return with_run(p, stream, [](auto run) { run.backward_backward(); });
}

}  // namespace cuda
}  // namespace fastinterp
