// Element formulas shared by the CPU and the CUDA kernels, so that the CPU tests cover both.
#pragma once

#if defined(__CUDACC__)
#define FI_INLINE __host__ __device__ __forceinline__
#define FI_LIBM(name) ::name
#else
#define FI_INLINE inline
#define FI_LIBM(name) __builtin_##name
#endif

#include <cstdint>

namespace fastinterp {
namespace {  // internal linkage: each instruction-set variant must keep its own copy

// Sums and steps are in float for every element type but double.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

FI_INLINE float root(float v) { return FI_LIBM(sqrtf)(v); }
FI_INLINE double root(double v) { return FI_LIBM(sqrt)(v); }

template <typename T>
FI_INLINE T sign(T v) {
  return static_cast<T>((v > T(0)) - (v < T(0)));
}

// Comparisons are written so that a NaN in v comes through, as in torch.clamp.
template <typename T>
FI_INLINE T clamp(T v, T low, T high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// clip(clamp(x + s sign(g), o - eps, o + eps))
template <typename T>
FI_INLINE T linf_step(T x, T grad, T origin, T eps, T step, T clip_min, T clip_max) {
  const T moved = x + step * sign(grad);
  return clamp(clamp(moved, origin - eps, origin + eps), clip_min, clip_max);
}

// step / length, or zero for a zero direction; a NaN comes through.
template <typename T>
FI_INLINE T unit_scale(T length, T step) {
  return length == T(0) ? T(0) : step / length;
}

// min(1, eps / length): the projection of a vector of that length onto the eps ball.
template <typename T>
FI_INLINE T ball_scale(T length, T eps) {
  return length > eps ? eps / length : T(1);
}

// What the pairs i < j of two rows have in common. Sums of integers: any order gives the same.
struct PairCounts {
  std::int64_t agreement;  // sum sign(a_i - a_j) sign(b_i - b_j)
  std::int64_t differ_a;   // how many pairs differ in a
  std::int64_t differ_b;   // in b
  std::int64_t nans;       // elements that are no numbers
};

// Kendall's tau-b. NaN where a row is constant, and where there are no pairs.
FI_INLINE double kendall_tau_b(const PairCounts& c) {
  const double nan = __builtin_nan("");
  if (c.nans != 0 || c.differ_a == 0 || c.differ_b == 0) return nan;
  const double tau = static_cast<double>(c.agreement) / root(static_cast<double>(c.differ_a)) /
                     root(static_cast<double>(c.differ_b));
  return clamp(tau, -1.0, 1.0);
}

}  // namespace
}  // namespace fastinterp
