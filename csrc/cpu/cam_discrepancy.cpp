#include "../math.h"
#include "arch.h"

namespace fastinterp {
namespace cpu {
namespace FI_ARCH {
namespace {

constexpr std::int64_t kTile = 64;          // pixels of one class map held at a time
constexpr std::int64_t kSerialWork = 1 << 16;  // feature values below which threads cost more
constexpr std::int64_t kHeadPartials = 16;  // fixed, so that grad_head does not depend on `threads`

bool parallel(const CamDiscrepancy& p) {
  return p.threads > 1 && p.examples * p.channels * p.pixels >= kSerialWork;
}

// tile[c][j] = features[n,c,p0+j] - features_adv[n,c,p0+j], zero beyond the last pixel
template <typename T, typename A>
void load_difference(const CamDiscrepancy& p, std::int64_t n, std::int64_t p0, A* tile) {
  const FeatureStrides s = p.features_strides, t = p.features_adv_strides;
  const T* a = static_cast<const T*>(p.features) + n * s.example + p0 * s.pixel;
  const T* b = static_cast<const T*>(p.features_adv) + n * t.example + p0 * t.pixel;
  const std::int64_t width = p.pixels - p0 < kTile ? p.pixels - p0 : kTile;
  if (s.pixel == 1 && t.pixel == 1) {
    for (std::int64_t c = 0; c < p.channels; ++c) {
      const T *ac = a + c * s.channel, *bc = b + c * t.channel;
      A* row = tile + c * kTile;
#pragma omp simd
      for (std::int64_t j = 0; j < width; ++j) row[j] = load(ac + j) - load(bc + j);
      for (std::int64_t j = width; j < kTile; ++j) row[j] = 0;
    }
    return;
  }
  for (std::int64_t j = 0; j < width; ++j) {
    const T *aj = a + j * s.pixel, *bj = b + j * t.pixel;
    for (std::int64_t c = 0; c < p.channels; ++c) {
      tile[c * kTile + j] = load(aj + c * s.channel) - load(bj + c * t.channel);
    }
  }
  for (std::int64_t c = 0; c < p.channels; ++c) {
    for (std::int64_t j = width; j < kTile; ++j) tile[c * kTile + j] = 0;
  }
}

// map[j] = sum_c head[k,c] tile[c][j]
template <typename A>
void class_map(const CamDiscrepancy& p, std::int64_t k, const A* tile, A* map) {
  if (p.head == nullptr) {
    for (std::int64_t j = 0; j < kTile; ++j) map[j] = tile[k * kTile + j];
    return;
  }
  const A* w = static_cast<const A*>(p.head) + k * p.channels;
  A sum[kTile] = {};
  for (std::int64_t c = 0; c < p.channels; ++c) {
    const A wc = w[c];
    const A* row = tile + c * kTile;
#pragma omp simd
    for (std::int64_t j = 0; j < kTile; ++j) sum[j] += wc * row[j];
  }
  for (std::int64_t j = 0; j < kTile; ++j) map[j] = sum[j];
}

template <typename T>
void forward(const CamDiscrepancy& p) {
  using A = acc_t<T>;
  const A* q = static_cast<const A*>(p.class_weights);
  A* total = static_cast<A*>(p.discrepancy);
  A* distances = static_cast<A*>(p.distances);
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p))
  for (std::int64_t n = 0; n < p.examples; ++n) {
    A* tile = static_cast<A*>(p.scratch) + thread_index() * p.channels * kTile;
    A* d = distances + n * p.classes;
    for (std::int64_t k = 0; k < p.classes; ++k) d[k] = 0;
    for (std::int64_t p0 = 0; p0 < p.pixels; p0 += kTile) {
      load_difference<T>(p, n, p0, tile);
      for (std::int64_t k = 0; k < p.classes; ++k) {
        A map[kTile];
        class_map(p, k, tile, map);
        A sum = 0;
        if (p.norm == MapNorm::l1) {
#pragma omp simd reduction(+ : sum)
          for (std::int64_t j = 0; j < kTile; ++j) sum += map[j] < 0 ? -map[j] : map[j];
        } else {
#pragma omp simd reduction(+ : sum)
          for (std::int64_t j = 0; j < kTile; ++j) sum += map[j] * map[j];
        }
        d[k] += sum;
      }
    }
    A sum = 0;
    for (std::int64_t k = 0; k < p.classes; ++k) {
      if (p.norm == MapNorm::l2) d[k] = root(d[k]);
      sum += q[n * p.classes + k] * d[k];
    }
    total[n] = sum;
  }
}

// With e = class_grad and S[k,p] = e_k sign(M) for l1, e_k M / d_k for l2 (0 where d_k is 0):
//   grad_features_adv[c,p] = -sum_k head[k,c] S[k,p]
//   grad_head[k,c]        =  sum_{n,p} S[k,p] (features - features_adv)[c,p]
template <typename T>
void backward_example(const CamDiscrepancy& p, std::int64_t n, acc_t<T>* scratch,
                      acc_t<T>* head_partial) {
  using A = acc_t<T>;
  const std::int64_t channels = p.channels, classes = p.classes;
  const bool l1 = p.norm == MapNorm::l1;
  const A* head = static_cast<const A*>(p.head);
  const A* e = static_cast<const A*>(p.class_grad) + n * classes;
  const A* d = static_cast<const A*>(p.distances) + n * classes;
  const FeatureStrides g = p.grad_strides;
  T* out = static_cast<T*>(p.grad_features_adv);
  A* tile = scratch;
  A* slopes = scratch + channels * kTile;  // S of every class on this tile of pixels
  for (std::int64_t p0 = 0; p0 < p.pixels; p0 += kTile) {
    load_difference<T>(p, n, p0, tile);
    for (std::int64_t k = 0; k < classes; ++k) {
      A* slope = slopes + k * kTile;
      if (e[k] == A(0)) {
        for (std::int64_t j = 0; j < kTile; ++j) slope[j] = 0;
        continue;
      }
      class_map(p, k, tile, slope);
      const A factor = l1 ? e[k] : (d[k] > A(0) ? e[k] / d[k] : A(0));
      if (l1) {
#pragma omp simd
        for (std::int64_t j = 0; j < kTile; ++j) slope[j] = factor * sign(slope[j]);
      } else {
#pragma omp simd
        for (std::int64_t j = 0; j < kTile; ++j) slope[j] *= factor;
      }
    }
    if (head_partial != nullptr) {
      for (std::int64_t k = 0; k < classes; ++k) {
        if (e[k] == A(0)) continue;
        const A* slope = slopes + k * kTile;
        for (std::int64_t c = 0; c < channels; ++c) {
          const A* row = tile + c * kTile;
          A sum = 0;
#pragma omp simd reduction(+ : sum)
          for (std::int64_t j = 0; j < kTile; ++j) sum += slope[j] * row[j];
          head_partial[k * channels + c] += sum;
        }
      }
    }
    if (out == nullptr) continue;
    const std::int64_t width = p.pixels - p0 < kTile ? p.pixels - p0 : kTile;
    T* base = out + n * g.example + p0 * g.pixel;
    for (std::int64_t c = 0; c < channels; ++c) {
      A sum[kTile] = {};
      if (head == nullptr) {
        for (std::int64_t j = 0; j < kTile; ++j) sum[j] = slopes[c * kTile + j];
      } else {
        for (std::int64_t k = 0; k < classes; ++k) {
          const A w = head[k * channels + c];
          const A* slope = slopes + k * kTile;
#pragma omp simd
          for (std::int64_t j = 0; j < kTile; ++j) sum[j] += w * slope[j];
        }
      }
      T* row = base + c * g.channel;
      if (g.pixel == 1) {
#pragma omp simd
        for (std::int64_t j = 0; j < width; ++j) store(row + j, -sum[j]);
      } else {
        for (std::int64_t j = 0; j < width; ++j) store(row + j * g.pixel, -sum[j]);
      }
    }
  }
}

template <typename T>
void backward(const CamDiscrepancy& p) {
  using A = acc_t<T>;
  A* scratch = static_cast<A*>(p.scratch);
  const std::int64_t per_thread = (p.channels + p.classes) * kTile;
  if (p.grad_head == nullptr) {
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p))
    for (std::int64_t n = 0; n < p.examples; ++n) {
      backward_example<T>(p, n, scratch + thread_index() * per_thread, nullptr);
    }
    return;
  }
  const std::int64_t head_size = p.classes * p.channels;
  A* partials = scratch + p.threads * per_thread;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p))
  for (std::int64_t part = 0; part < kHeadPartials; ++part) {
    A* partial = partials + part * head_size;
    for (std::int64_t i = 0; i < head_size; ++i) partial[i] = 0;
    const std::int64_t begin = part * p.examples / kHeadPartials;
    const std::int64_t end = (part + 1) * p.examples / kHeadPartials;
    for (std::int64_t n = begin; n < end; ++n) {
      backward_example<T>(p, n, scratch + thread_index() * per_thread, partial);
    }
  }
  A* grad_head = static_cast<A*>(p.grad_head);
  for (std::int64_t i = 0; i < head_size; ++i) {
    A sum = 0;
    for (std::int64_t part = 0; part < kHeadPartials; ++part) sum += partials[part * head_size + i];
    grad_head[i] = sum;
  }
}

}  // namespace

std::int64_t cam_discrepancy_scratch_bytes(const CamDiscrepancy& p) {
  const std::int64_t element = p.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  const std::int64_t tiles = p.threads * (p.channels + p.classes) * kTile;
  const std::int64_t partials = p.grad_head ? kHeadPartials * p.classes * p.channels : 0;
  return (tiles + partials) * element;
}

void cam_discrepancy_forward(const CamDiscrepancy& p) {
  with_dtype(p.dtype, [&](auto element) { forward<decltype(element)>(p); });
}

void cam_discrepancy_backward(const CamDiscrepancy& p) {
  with_dtype(p.dtype, [&](auto element) { backward<decltype(element)>(p); });
}

}  // namespace FI_ARCH
}  // namespace cpu
}  // namespace fastinterp
