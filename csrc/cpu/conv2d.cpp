// Convolution of tensors whose fastest dimension is the example: (H, W, C, N) in memory.
//
// A vector holds one pixel's channel of as many examples as it has lanes, so that no shape of image,
// kernel or channels leaves lanes idle, and a tap that falls outside the image is left out instead of
// being multiplied by zero: of the 49 taps of a 7x7 kernel over a 7x7 map that is 43 %. The input
// gradient is the same sum with other taps:
//
//     out[p, o] = bias[o] + sum over (t, q) with q = p stride - padding + t dilation, c
//                               weight[o, t, c] in[q, c]
//     adjoint:              over (t, q) with p = q stride - padding + t dilation
//
// On the way out a ReLU, or the zeros of one's derivative, cost nothing.
#include "vector.h"

namespace fastinterp {
namespace cpu {
namespace FI_ARCH {
namespace {

#if defined(__AVX512F__)
constexpr int kSums = 24;  // vectors of sums in registers
constexpr int kMostVectors = 4;
#else
constexpr int kSums = 12;
constexpr int kMostVectors = 3;
#endif
constexpr int kMostRows = 6;
constexpr std::int64_t kSerialWork = 1 << 16;  // products below which threads cost more

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The taps that meet a pixel of the output along one axis: tap + k tap_step meets at + k at_step.
struct Taps {
  std::int64_t count, tap, tap_step, at, at_step;
};

Taps find_taps(const Conv2d& p, int axis, std::int64_t out) {
  const std::int64_t stride = p.stride[axis], dilation = p.dilation[axis];
  const std::int64_t size = p.in_size[axis], kernel = p.kernel[axis];
  Taps taps{0, 0, 1, out * stride - p.padding[axis], dilation};
  if (p.adjoint) {
    // at = (out + padding - tap dilation) / stride, for the taps that it is a whole number for
    const std::int64_t reach = out + p.padding[axis];
    while (taps.tap < kernel && (reach - taps.tap * dilation) % stride != 0) ++taps.tap;
    while (taps.tap_step * dilation % stride != 0) ++taps.tap_step;
    taps.at = (reach - taps.tap * dilation) / stride;
    taps.at_step = -taps.tap_step * dilation / stride;
  }
  for (; taps.tap < kernel && (taps.at < 0 || taps.at >= size); taps.tap += taps.tap_step) {
    taps.at += taps.at_step;
  }
  for (std::int64_t tap = taps.tap, at = taps.at; tap < kernel && at >= 0 && at < size;
       tap += taps.tap_step, at += taps.at_step) {
    ++taps.count;
  }
  return taps;
}

// Numbers of weights, an even one so that what comes after them is aligned.
std::int64_t weights(const Conv2d& p) {
  return (p.kernel[0] * p.kernel[1] * p.in_channels * p.out_channels + 1) / 2 * 2;
}

// A pixel of the output: where its sums begin in `in` and in the packed weights (in rows of a block),
// and the steps of three loops.
struct Sum {
  std::int64_t in, weight, count[3], in_step[3], weight_step[2];
};

Sum find_sum(const Conv2d& p, const Taps& down, const Taps& right) {
  const std::int64_t channels = p.in_channels;
  const std::int64_t pixel = channels * p.examples, line = p.in_size[1] * pixel;
  Sum sum{down.at * line + right.at * pixel,
          (down.tap * p.kernel[1] + right.tap) * channels,
          {down.count, right.count, channels},
          {down.at_step * line, right.at_step * pixel, p.examples},
          {down.tap_step * p.kernel[1] * channels, right.tap_step * channels}};
  if (right.tap_step == 1 && right.at_step == 1) {
    sum.count[2] *= sum.count[1];  // a row of taps is one run
    sum.count[1] = 1;
  }
  return sum;
}

// Where R channels of a pixel, of Q vectors of examples, are read and written.
template <typename T>
struct Place {
  const T *in, *weight, *bias, *gate;  // weight (taps, in_channels, R); bias and gate may be null
  T* out;
  std::int64_t row;  // from one channel to the next, of gate and of out
  bool relu;
};

template <typename T, int R, int Q>
void add_up(const Sum& sum, const Place<T>& at) {
  using V = typename Vector<T>::type;
  constexpr int lanes = Vector<T>::lanes;
  // Few sums are each made in parts, so that enough of them are under way at a time.
  constexpr int U = R * Q < 3 ? 4 : R * Q < 8 ? 2 : 1;
  V sums[U][R][Q];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T begin = u > 0 || at.bias == nullptr ? T(0) : at.bias[r];
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) sums[u][r][q] = V{} + begin;
    }
  }
  const auto add = [&sums](int u, const T* a, const T* b) {
    V row[Q];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) row[q] = load_vector(a + q * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) sums[u][r][q] += b[r] * row[q];
    }
  };
  for (std::int64_t i = 0; i < sum.count[0]; ++i) {
    for (std::int64_t j = 0; j < sum.count[1]; ++j) {
      const T* a = at.in + sum.in + i * sum.in_step[0] + j * sum.in_step[1];
      const T* b = at.weight + (sum.weight + i * sum.weight_step[0] + j * sum.weight_step[1]) * R;
      std::int64_t l = 0;
      for (; l + U <= sum.count[2]; l += U) {
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u, a += sum.in_step[2], b += R) add(u, a, b);
      }
      for (; l < sum.count[2]; ++l, a += sum.in_step[2], b += R) add(0, a, b);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const std::int64_t i = r * at.row + q * lanes;
      V v = sums[0][r][q];
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) v += sums[u][r][q];
      if (at.gate != nullptr) v = load_vector(at.gate + i) <= T(0) ? V{} : v;
      if (at.relu) v = v < T(0) ? V{} : v;  // a NaN stays one
      store_vector(at.out + i, v);
    }
  }
}

// `total` in parts of nearly the same size, at most `most`.
struct Parts {
  std::int64_t total, count;

  Parts(std::int64_t total, std::int64_t most) : total(total), count(ceil_div(total, most)) {}
  std::int64_t begin(std::int64_t i) const { return i * total / count; }
  int size(std::int64_t i) const { return static_cast<int>(begin(i + 1) - begin(i)); }
  std::int64_t largest() const { return ceil_div(total, count); }
};

template <typename T>
struct Plan {
  static constexpr int lanes = Vector<T>::lanes;
  const Conv2d& p;
  Parts vectors, rows;
  std::int64_t depth;

  explicit Plan(const Conv2d& given)
      : p(given), vectors(ceil_div(p.examples, lanes), kMostVectors), rows(1, 1) {
    while (vectors.largest() * lanes > p.examples) ++vectors.count;
    const std::int64_t most = kSums / vectors.largest();
    rows = Parts(p.out_channels, most < kMostRows ? most : kMostRows);
    depth = p.kernel[0] * p.kernel[1] * p.in_channels;
  }

  T* packed() const { return static_cast<T*>(p.scratch); }
  // Of every row of the output, then of every column.
  Taps* taps() const { return reinterpret_cast<Taps*>(packed() + weights(p)); }

  // Weights of a part of the output's channels as add_up reads them.
  void pack(std::int64_t part) const {
    const std::int64_t first = rows.begin(part), size = rows.size(part);
    T* to = packed() + first * depth;
    for (std::int64_t i = 0; i < p.kernel[0]; ++i) {
      for (std::int64_t j = 0; j < p.kernel[1]; ++j) {
        const T* from = static_cast<const T*>(p.weight) + first * p.weight_out +
                        i * p.weight_tap[0] + j * p.weight_tap[1];
        for (std::int64_t c = 0; c < p.in_channels; ++c, to += size) {
          for (std::int64_t r = 0; r < size; ++r) to[r] = from[c * p.weight_in + r * p.weight_out];
        }
      }
    }
  }

  // Pixels in [begin, end), as many as a line has at a time: from one to the next a part's weights
  // stay in the first cache, from one part to the next what the line reads stays in the second.
  void pixels(std::int64_t begin, std::int64_t end) const {
    const std::int64_t line = p.out_size[1];
    for (std::int64_t v = 0; v < vectors.count; ++v) {
      for (std::int64_t at = begin; at < end; at += line) {
        for (std::int64_t r = 0; r < rows.count; ++r) {
          for (std::int64_t i = at; i < at + line && i < end; ++i) sums(v, r, i);
        }
      }
    }
  }

  void sums(std::int64_t v, std::int64_t r, std::int64_t pixel) const {
    // The last part ends with the last example: what overlaps is written twice, and the same.
    const std::int64_t last = p.examples - vectors.size(v) * lanes;
    const std::int64_t first = vectors.begin(v) * lanes < last ? vectors.begin(v) * lanes : last;
    const std::int64_t o = rows.begin(r);
    const std::int64_t out = (pixel * p.out_channels + o) * p.examples + first;
    const auto part = [](const void* base, std::int64_t i) {
      return base == nullptr ? nullptr : static_cast<const T*>(base) + i;
    };
    const Place<T> place{part(p.in, first), packed() + o * depth, part(p.bias, o),
                         part(p.gate, out), static_cast<T*>(p.out) + out, p.examples, p.relu};
    block<kMostVectors>(vectors.size(v), rows.size(r),
                        find_sum(p, taps()[pixel / p.out_size[1]],
                                 taps()[p.out_size[0] + pixel % p.out_size[1]]),
                        place);
  }

  template <int Q, int R = kMostRows>
  void block(int q, int r, const Sum& sum, const Place<T>& place) const {
    if constexpr (Q * R <= kSums) {
      if (q == Q && r == R) return add_up<T, R, Q>(sum, place);
    }
    if constexpr (R > 1) {
      if (q == Q) return block<Q, R - 1>(q, r, sum, place);
    }
    if constexpr (Q > 1) block<Q - 1>(q, r, sum, place);
  }
};

template <typename T>
void convolve(const Conv2d& p) {
  const Plan<T> plan(p);
  const std::int64_t pixels = p.out_size[0] * p.out_size[1];
  const bool parallel =
      p.threads > 1 && pixels * p.out_channels * p.in_channels * p.examples >= kSerialWork;
  for (int axis = 0; axis < 2; ++axis) {
    Taps* taps = plan.taps() + axis * p.out_size[0];
    for (std::int64_t i = 0; i < p.out_size[axis]; ++i) taps[i] = find_taps(p, axis, i);
  }
#pragma omp parallel num_threads(p.threads) if (parallel)
  {
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < plan.rows.count; ++i) plan.pack(i);
    const std::int64_t t = thread_index(), threads = thread_count();
    plan.pixels(t * pixels / threads, (t + 1) * pixels / threads);
  }
}

}  // namespace

std::int64_t conv2d_scratch_bytes(const Conv2d& p) {
  const std::int64_t size = p.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return weights(p) * size + (p.out_size[0] + p.out_size[1]) * sizeof(Taps);
}

void conv2d(const Conv2d& p) {
  if (p.dtype == DType::f64) return convolve<double>(p);
  convolve<float>(p);
}

}  // namespace FI_ARCH
}  // namespace cpu
}  // namespace fastinterp
