// Activations and their first two derivatives, shared by the CPU and the CUDA kernels. The float
// forms have neither branches nor library calls, so loops over them vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "math.h"

namespace fastinterp {
namespace {

FI_INLINE std::uint32_t bits_of(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
FI_INLINE float float_of(std::uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

template <typename T>
FI_INLINE T magnitude(T v) {
  return v < T(0) ? -v : v;
}

// e^v = 2^n e^r with r = v - n ln 2, |r| <= ln 2 / 2, within 1 ulp. Adding 1.5 * 2^23 rounds to an
// integer and leaves it in the low bits. 2^n is applied as two factors: it may be subnormal.
FI_INLINE float exponential(float v) {
  v = clamp(v, -104.0f, 89.0f);
  const float shifted = v * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 0.00139013189f;
  p = p * r + 0.00836325996f;
  p = p * r + 0.0416668542f;
  p = p * r + 0.166665763f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  const std::int32_t power = static_cast<std::int32_t>(bits_of(shifted) - 0x4b400000u);
  const std::int32_t half = power >> 1;
  const float low = float_of(static_cast<std::uint32_t>(half + 127) << 23);
  const float high = float_of(static_cast<std::uint32_t>(power - half + 127) << 23);
  return p * low * high;
}
FI_INLINE double exponential(double v) { return FI_LIBM(exp)(v); }

// log(1 + u) = 2 atanh(u / (2 + u)), for 0 <= u <= 1
FI_INLINE float log_one_plus(float u) {
  const float s = u / (2.0f + u), q = s * s;
  float p = 0.134304941f;
  p = p * q + 0.14117524f;
  p = p * q + 0.200038135f;
  p = p * q + 0.333333194f;
  return 2.0f * s + 2.0f * s * (p * q);
}
FI_INLINE double log_one_plus(double u) { return FI_LIBM(log1p)(u); }

template <typename T>
struct Normal {
  T density;       // exp(-z^2 / 2) / sqrt(2 pi)
  T distribution;  // its integral up to z
};

// The integral beyond t = |z| is exp(-t^2 / 2) m(t) with a smooth m, a polynomial in
// w = (t - 3) / (t + 3); beyond 14.5 it is no float any more.
FI_INLINE Normal<float> normal(float z) {
  const float t = magnitude(z), capped = t > 14.5f ? 14.5f : t;
  const float e = exponential(-0.5f * t * t);
  const float w = (capped - 3.0f) / (capped + 3.0f);
  float m = 5.31613587e-05f;
  m = m * w + 0.00011501438f;
  m = m * w - 0.000339012331f;
  m = m * w - 0.000983288977f;
  m = m * w + 0.00290438742f;
  m = m * w + 0.00613194238f;
  m = m * w - 0.0462132655f;
  m = m * w + 0.123225041f;
  m = m * w - 0.206402615f;
  m = m * w + 0.121513948f;
  const float tail = e * m;
  return {e * 0.398942280f, z < 0.0f ? tail : 1.0f - tail};
}
FI_INLINE Normal<double> normal(double z) {
  return {FI_LIBM(exp)(-0.5 * z * z) * 0.39894228040143267794,
          0.5 * FI_LIBM(erfc)(z * -0.70710678118654752440)};
}

template <typename T>
struct Logistic {
  T value;  // s = 1 / (1 + exp(-z))
  T slope;  // s (1 - s), without cancellation
};

template <typename T>
FI_INLINE Logistic<T> logistic(T z) {
  const T e = exponential(-magnitude(z)), s = T(1) / (T(1) + e);
  return {z < T(0) ? e * s : s, e * s * s};
}

// phi(z); alpha is the slope for z < 0 of leaky_relu, the beta of softplus
//     softplus: log(1 + exp(beta z)) / beta     silu: z s(z)     gelu: z times the normal integral
template <Activation K, typename T>
FI_INLINE T activation_value(T z, [[maybe_unused]] T alpha) {
  if constexpr (K == Activation::relu) {
    return z < T(0) ? T(0) : z;
  } else if constexpr (K == Activation::leaky_relu) {
    return z > T(0) ? z : alpha * z;
  } else if constexpr (K == Activation::softplus) {
    const T b = alpha * z;
    return ((b < T(0) ? T(0) : b) + log_one_plus(exponential(-magnitude(b)))) / alpha;
  } else if constexpr (K == Activation::silu) {
    return z * logistic(z).value;
  } else if constexpr (K == Activation::gelu) {
    return z * normal(z).distribution;
  } else {
    return z;
  }
}

// phi'(z); zero at the kink of relu, alpha at that of leaky_relu
template <Activation K, typename T>
FI_INLINE T activation_slope(T z, [[maybe_unused]] T alpha) {
  if constexpr (K == Activation::relu) {
    return z > T(0) ? T(1) : T(0);
  } else if constexpr (K == Activation::leaky_relu) {
    return z > T(0) ? T(1) : alpha;
  } else if constexpr (K == Activation::softplus) {
    return logistic(alpha * z).value;
  } else if constexpr (K == Activation::silu) {
    const Logistic<T> s = logistic(z);
    return s.value + z * s.slope;
  } else if constexpr (K == Activation::gelu) {
    const Normal<T> g = normal(z);
    return g.distribution + z * g.density;
  } else {
    return T(1);
  }
}

template <Activation K>
constexpr bool is_smooth =
    K == Activation::softplus || K == Activation::silu || K == Activation::gelu;

// phi'(z) v of a piecewise linear phi, from the sign of z; numbers or vectors of them
template <Activation K, typename Mask, typename X, typename A>
FI_INLINE X gated([[maybe_unused]] Mask positive, X v, [[maybe_unused]] A alpha) {
  if constexpr (K == Activation::identity) {
    return v;
  } else if constexpr (K == Activation::relu) {
    return positive ? v : X{};
  } else {
    return positive ? v : alpha * v;
  }
}

// phi''(z), taken as zero at a kink
template <Activation K, typename T>
FI_INLINE T activation_curvature(T z, [[maybe_unused]] T alpha) {
  if constexpr (K == Activation::softplus) {
    return alpha * logistic(alpha * z).slope;
  } else if constexpr (K == Activation::silu) {
    const Logistic<T> s = logistic(z);
    return s.slope * (T(2) + z * (T(1) - T(2) * s.value));
  } else if constexpr (K == Activation::gelu) {
    return normal(z).density * (T(2) - z * z);
  } else {
    return T(0);
  }
}

}  // namespace
}  // namespace fastinterp
