// Element formulas shared by the CPU and the CUDA kernels, so that the CPU tests cover both.
#pragma once

#if defined(__CUDACC__)
#define FI_INLINE __host__ __device__ __forceinline__
#else
#define FI_INLINE inline
#endif

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

}  // namespace
}  // namespace fastinterp
