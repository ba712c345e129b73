// What an ascent on class maps raises, their means being the logits, and its slope:
//
//     s_k = sum_p |m - c|      f_k = mean_p m + bias_k      q = softmax of f without class y
//     D = s_y + sum over k != y of q_k s_k
//     dD/dm  = w_k sign(m - c) + [k != y] q_k (s_k - sum_j q_j s_j) / P,   w = q, w_y = 1
//     dCE/dm = (p_k - [k = y]) / P,   p the softmax of f,  p_k = (1 - p_y) q_k
//
// The examples lie side by side: every loop is over them.
#include "../activations.h"
#include "arch.h"

namespace fastinterp {
namespace cpu {
namespace FI_ARCH {
namespace {

template <typename T>
void slope_of(const MapObjective& p) {
  const std::int64_t N = p.examples, K = p.classes, P = p.pixels;
  const T a = static_cast<T>(p.cross_entropy), b = static_cast<T>(p.discrepancy);
  const T *clean = static_cast<const T*>(p.clean), *maps = static_cast<const T*>(p.maps);
  T* slope = static_cast<T*>(p.slope);
  // The first three (K, N), the others (N,); `shift` is the part of the slope that no pixel changes.
  T* size = static_cast<T*>(p.scratch);
  T *weight = size + K * N, *shift = weight + K * N;
  T *largest = shift + K * N, *own = largest + N, *total = own + N, *mean = total + N;

  for (std::int64_t i = 0; i < K * N; ++i) size[i] = weight[i] = 0;
  for (std::int64_t i = 0; i < P * K; ++i) {
    const T* m = maps + i * N;
    T *s = size + i % K * N, *f = weight + i % K * N;
    if (clean != nullptr) {
      const T* c = clean + i * N;
#pragma omp simd
      for (std::int64_t n = 0; n < N; ++n) {
        const T d = m[n] - c[n];
        s[n] += d < 0 ? -d : d;
        f[n] += m[n];
      }
    } else {
#pragma omp simd
      for (std::int64_t n = 0; n < N; ++n) f[n] += m[n];
    }
  }
  const T infinity = __builtin_inf();
  for (std::int64_t n = 0; n < N; ++n) {
    largest[n] = -infinity;
    own[n] = infinity;  // of no class: nothing to raise
    total[n] = mean[n] = 0;
  }
  for (std::int64_t k = 0; k < K; ++k) {
    const T bias = p.bias == nullptr ? T(0) : static_cast<const T*>(p.bias)[k];
    T* f = weight + k * N;
    for (std::int64_t n = 0; n < N; ++n) {
      f[n] = f[n] / static_cast<T>(P) + bias;
      if (k == p.y[n]) {
        own[n] = f[n];
      } else if (!(f[n] <= largest[n])) {
        largest[n] = f[n];
      }
    }
  }
  for (std::int64_t k = 0; k < K; ++k) {
    T* q = weight + k * N;
    for (std::int64_t n = 0; n < N; ++n) {
      q[n] = k == p.y[n] ? T(0) : exponential(q[n] - largest[n]);
      total[n] += q[n];
    }
  }
  for (std::int64_t k = 0; k < K; ++k) {
    T *q = weight + k * N, *s = size + k * N;
    for (std::int64_t n = 0; n < N; ++n) {
      q[n] /= total[n];
      mean[n] += q[n] * s[n];
    }
  }
  // total: 1 - p_y, however small; own: p_y - 1, which is nothing where p_y rounds to 1, as in torch
  for (std::int64_t n = 0; n < N; ++n) {
    const T gap = own[n] - largest[n], e = exponential(gap > 0 ? -gap : gap);
    const T mine = gap > 0 ? T(1) : e, others = gap > 0 ? e * total[n] : total[n];
    total[n] = others / (mine + others);
    own[n] = mine / (mine + others) - 1;
  }
  for (std::int64_t k = 0; k < K; ++k) {
    T *q = weight + k * N, *s = size + k * N, *level = shift + k * N;
    for (std::int64_t n = 0; n < N; ++n) {
      const bool is_own = k == p.y[n];
      const T ce = is_own ? own[n] : total[n] * q[n];
      const T discrepancy = is_own ? T(0) : q[n] * (s[n] - mean[n]);
      level[n] = (a * ce + b * discrepancy) / static_cast<T>(P);
      q[n] = is_own ? b : b * q[n];
    }
  }
  for (std::int64_t i = 0; i < P * K; ++i) {
    const T *w = weight + i % K * N, *level = shift + i % K * N;
    T* out = slope + i * N;
    if (clean != nullptr) {
      const T *m = maps + i * N, *c = clean + i * N;
#pragma omp simd
      for (std::int64_t n = 0; n < N; ++n) {
        const T d = m[n] - c[n];
        out[n] = level[n] + (d > 0 ? w[n] : d < 0 ? -w[n] : d);
      }
    } else {
      for (std::int64_t n = 0; n < N; ++n) out[n] = level[n];
    }
  }
}

}  // namespace

std::int64_t map_objective_scratch_bytes(const MapObjective& p) {
  const std::int64_t size = p.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return (3 * p.classes + 4) * p.examples * size;
}

void map_objective(const MapObjective& p) {
  if (p.dtype == DType::f64) return slope_of<double>(p);
  slope_of<float>(p);
}

}  // namespace FI_ARCH
}  // namespace cpu
}  // namespace fastinterp
