// y = phi(gamma xh + beta + residual), xh = (x - mean) rstd, and its first two derivatives: formulas
// shared by the CPU and the CUDA kernels.
//
// With g = phi'(z) gy, s1 = sum g, s2 = sum g xh, M elements a channel (sums are per channel):
//     gx        = gamma rstd (g - s1/M - xh s2/M)            batch statistics
//               = gamma rstd g                               running statistics
//     gresidual = g      ggamma = s2      gbeta = s1
// With cotangents v of gx, u of gresidual, a_gamma and a_beta, w = phi''(z) gy:
//     q    = gamma rstd (v - Sv/M - xh Svx/M) + u + a_gamma xh + a_beta
//     ggy  = phi'(z) q       h = w q (cotangent of z)       gresidual2 = h
//     gx2  = -(gamma rstd^2/M) [a xh + s2 (v - Sv/M - xh Svx/M) + Svx (g - s1/M - xh s2/M)]
//            + rstd a_gamma (g - s1/M - xh s2/M) + gamma rstd (h - H1/M - xh H2/M)
//     a    = Svg - Sv s1/M - Svx s2/M      ggamma2 = rstd a + H2      gbeta2 = H1
// where Sv = sum v, Svx = sum v xh, Svg = sum v g, H1 = sum h, H2 = sum h xh. With running statistics
// only a = Svg, rstd a_gamma g and gamma rstd h remain. h is linear in what the sums give, so one
// pass collects them all.
//
// Below, d = x - mean and scale = gamma rstd; what belongs to a channel is computed in double.
#pragma once

#include "math.h"

namespace fastinterp {
namespace {

struct NormStatistics {
  double mean, var, unbiased_var;
};

// From the sums of x - pivot and of its square over `count` elements.
FI_INLINE NormStatistics norm_statistics(double pivot, double sum, double squares, double count) {
  const double elements = count > 0 ? count : 1, shift = sum / elements;
  double var = squares / elements - shift * shift;
  if (var < 0) var = 0;
  return {pivot + shift, var, var * count / (count > 1 ? count - 1 : 1)};
}

// gx = scale g + constant + by_d d
struct NormBackward {
  double constant, by_d;
};

// `share` is 1/M with batch statistics, else 0.
FI_INLINE NormBackward norm_backward(double scale, double rstd, double sum_g, double sum_gx,
                                     double share) {
  return {-scale * share * sum_g, -scale * share * sum_gx * rstd};
}

// What the second order sums: v, v xh, v g; with w = phi'' gy the seven that make H1 and H2.
enum NormSecondSum { kSv, kSvx, kSvg, kSw, kSwx, kSwxx, kSvw, kSvwx, kSuw, kSuwx };
constexpr int kSumsPiecewise = 3, kSumsSmooth = 10;

struct NormSecondGiven {
  double scale, rstd, a_weight, a_bias;
  double sum_g, sum_gx;  // of the backward pass
  double share;          // 1/M with batch statistics, else 0
};

//     q   = scale v + u + q_d d + q_constant
//     gx2 = constant + by_d d + by_v v + by_g g + scale h
struct NormSecond {
  double q_constant, q_d, constant, by_d, by_v, by_g;
  double gweight, gbias;
};

template <bool kSmooth>
FI_INLINE NormSecond norm_second(const NormSecondGiven& k, const double* total) {
  const double mean_v = total[kSv] * k.share, mean_vx = total[kSvx] * k.share;
  const double mean_g = k.sum_g * k.share, mean_gx = k.sum_gx * k.share;
  const double q_constant = k.a_bias - k.scale * mean_v, q_x = k.a_weight - k.scale * mean_vx;
  double h1 = 0, h2 = 0;
  if constexpr (kSmooth) {
    h1 = k.scale * total[kSvw] + total[kSuw] + q_x * total[kSwx] + q_constant * total[kSw];
    h2 = k.scale * total[kSvwx] + total[kSuwx] + q_x * total[kSwxx] + q_constant * total[kSwx];
  }
  const double a = total[kSvg] - total[kSv] * mean_g - total[kSvx] * mean_gx;
  const double by_v = -k.scale * k.rstd * mean_gx, by_g = k.rstd * q_x;
  const double by_xh = -k.scale * k.rstd * a * k.share - by_v * mean_vx - by_g * mean_gx -
                       k.scale * h2 * k.share;
  return {q_constant,
          q_x * k.rstd,
          -by_v * mean_v - by_g * mean_g - k.scale * h1 * k.share,
          by_xh * k.rstd,
          by_v,
          by_g,
          k.rstd * a + h2,
          h1};
}

// Adds an element's terms to sum[kSums]; X is a number or a vector of them.
template <bool kSmooth, typename X>
FI_INLINE void add_second_terms(X* sum, X xh, X v, X g, [[maybe_unused]] X u,
                                [[maybe_unused]] X w) {
  sum[kSv] += v;
  sum[kSvx] += v * xh;
  sum[kSvg] += v * g;
  if constexpr (kSmooth) {
    const X vw = v * w, uw = u * w;
    sum[kSw] += w;
    sum[kSwx] += w * xh;
    sum[kSwxx] += w * xh * xh;
    sum[kSvw] += vw;
    sum[kSvwx] += vw * xh;
    sum[kSuw] += uw;
    sum[kSuwx] += uw * xh;
  }
}

}  // namespace
}  // namespace fastinterp
