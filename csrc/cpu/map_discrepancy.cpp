// The training form of the discrepancy of class maps whose means are the logits, and its slope:
//
//     s_k = sum_p |m - c|      f_k = mean_p m + bias_k      q = softmax of f without class y
//     D = s_y + sum over k != y of q_k s_k
//     dD/dm = w_k sign(m - c) + [k != y] q_k (s_k - sum_j q_j s_j) / P,   w = q, w_y = 1
//
// The examples lie side by side: every loop is over them.
#include "../activations.h"
#include "arch.h"

namespace fastinterp {
namespace cpu {
namespace FI_ARCH {
namespace {

template <typename T>
void discrepancy(const MapDiscrepancy& p) {
  const std::int64_t N = p.examples, K = p.classes, P = p.pixels;
  const T *clean = static_cast<const T*>(p.clean), *maps = static_cast<const T*>(p.maps);
  T *distance = static_cast<T*>(p.distance), *slope = static_cast<T*>(p.slope);
  // (K, N) each but for `largest` and `total`, (N,)
  T* size = static_cast<T*>(p.scratch);
  T *weight = size + K * N, *shift = weight + K * N, *largest = shift + K * N;
  T* total = largest + N;

  for (std::int64_t i = 0; i < K * N; ++i) size[i] = weight[i] = 0;
  for (std::int64_t i = 0; i < P * K; ++i) {
    const T *m = maps + i * N, *c = clean + i * N;
    T *s = size + i % K * N, *f = weight + i % K * N;
#pragma omp simd
    for (std::int64_t n = 0; n < N; ++n) {
      const T d = m[n] - c[n];
      s[n] += d < 0 ? -d : d;
      f[n] += m[n];
    }
  }
  for (std::int64_t n = 0; n < N; ++n) largest[n] = -__builtin_inf(), total[n] = distance[n] = 0;
  for (std::int64_t k = 0; k < K; ++k) {
    const T bias = p.bias == nullptr ? T(0) : static_cast<const T*>(p.bias)[k];
    T* f = weight + k * N;
    for (std::int64_t n = 0; n < N; ++n) {
      f[n] = f[n] / static_cast<T>(P) + bias;
      if (k != p.y[n] && !(f[n] <= largest[n])) largest[n] = f[n];
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
    T* q = weight + k * N;
    for (std::int64_t n = 0; n < N; ++n) {
      q[n] /= total[n];
      distance[n] += q[n] * size[k * N + n];
    }
  }
  for (std::int64_t k = 0; k < K; ++k) {
    T *q = weight + k * N, *s = size + k * N;
    for (std::int64_t n = 0; n < N; ++n) {
      const bool own = k == p.y[n];
      shift[k * N + n] = own ? T(0) : q[n] * (s[n] - distance[n]) / static_cast<T>(P);
      if (own) q[n] = 1;
    }
  }
  for (std::int64_t k = 0; k < K; ++k) {
    for (std::int64_t n = 0; n < N; ++n) distance[n] += k == p.y[n] ? size[k * N + n] : T(0);
  }
  for (std::int64_t i = 0; i < P * K; ++i) {
    const T *m = maps + i * N, *c = clean + i * N;
    const T *w = weight + i % K * N, *level = shift + i % K * N;
    T* out = slope + i * N;
#pragma omp simd
    for (std::int64_t n = 0; n < N; ++n) {
      const T d = m[n] - c[n];
      out[n] = level[n] + (d > 0 ? w[n] : d < 0 ? -w[n] : d);
    }
  }
}

}  // namespace

std::int64_t map_discrepancy_scratch_bytes(const MapDiscrepancy& p) {
  const std::int64_t size = p.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return (3 * p.classes + 2) * p.examples * size;
}

void map_discrepancy(const MapDiscrepancy& p) {
  if (p.dtype == DType::f64) return discrepancy<double>(p);
  discrepancy<float>(p);
}

}  // namespace FI_ARCH
}  // namespace cpu
}  // namespace fastinterp
