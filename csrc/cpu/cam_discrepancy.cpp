#include "outer_product.h"

namespace fastinterp {
namespace cpu {
namespace FI_ARCH {
namespace {

constexpr std::int64_t kTile = 64;          // pixels of an example worked on at a time
constexpr std::int64_t kSerialWork = 1 << 16;  // feature values below which threads cost more
constexpr std::int64_t kHeadPartials = 16;  // fixed, so that grad_head does not depend on `threads`

bool parallel(const CamDiscrepancy& p) {
  return p.threads > 1 && p.examples * p.channels * p.pixels >= kSerialWork;
}

// Classes, padded to whole vectors, where they are the contiguous dimension.
std::int64_t padded_classes(const CamDiscrepancy& p) { return (p.classes + 15) / 16 * 16; }

// Without a head the features are the maps and are worked on as (K, pixels) whatever their layout.
bool channels_last(const CamDiscrepancy& p) {
  return p.head != nullptr && p.features_adv_strides.channel == 1 &&
         p.features_adv_strides.pixel != 1;
}

// The caller's scratch: one region per thread, then the transposed head, then the head's partials.
template <typename A>
struct Scratch {
  const CamDiscrepancy& p;
  std::int64_t thread_size() const { return (p.channels + 2 * padded_classes(p)) * kTile; }
  std::int64_t head_size() const { return p.channels * padded_classes(p); }
  A* thread() const { return static_cast<A*>(p.scratch) + thread_index() * thread_size(); }
  A* transposed_head() const { return static_cast<A*>(p.scratch) + p.threads * thread_size(); }
  A* partial(std::int64_t i) const { return transposed_head() + (i + 1) * head_size(); }
  std::int64_t bytes() const {
    const std::int64_t heads = 1 + (p.grad_head == nullptr ? 0 : kHeadPartials);
    return (p.threads * thread_size() + heads * head_size()) * sizeof(A);
  }

  // transposed_head[c][k] = head[k][c], zero in the padding
  void transpose_head() const {
    const A* head = static_cast<const A*>(p.head);
    A* out = transposed_head();
    const std::int64_t padded = padded_classes(p);
    for (std::int64_t c = 0; c < p.channels; ++c) {
      for (std::int64_t k = 0; k < padded; ++k) {
        out[c * padded + k] = k < p.classes ? head[k * p.channels + c] : A(0);
      }
    }
  }
};

// One tile of pixels of one example. The difference of the features and the class maps are kept the
// way the features lie in memory:
//     NCHW           difference (C, kTile), maps (K, kTile), zero beyond `width`
//     channels_last  difference (width, C), maps (width, padded K)
template <typename T>
struct Tile {
  using A = acc_t<T>;
  const CamDiscrepancy& p;
  std::int64_t n, first, width, padded;
  bool last;
  const A* head;
  const A* transposed_head;
  A* difference;
  A* maps;
  A* transposed_maps;

  Tile(const CamDiscrepancy& params, std::int64_t example, std::int64_t first_pixel)
      : p(params),
        n(example),
        first(first_pixel),
        width(p.pixels - first < kTile ? p.pixels - first : kTile),
        padded(padded_classes(p)),
        last(channels_last(p)),
        head(static_cast<const A*>(p.head)) {
    const Scratch<A> scratch{p};
    transposed_head = scratch.transposed_head();
    difference = scratch.thread();
    transposed_maps = difference + p.channels * kTile;
    maps = head == nullptr ? difference : transposed_maps + padded * kTile;
  }

  std::int64_t rows() const { return last ? width : p.channels; }
  std::int64_t columns() const { return last ? p.channels : width; }
  std::int64_t row_length() const { return last ? p.channels : kTile; }
  std::int64_t row_stride(FeatureStrides s) const { return last ? s.pixel : s.channel; }
  std::int64_t column_stride(FeatureStrides s) const { return last ? s.channel : s.pixel; }

  void load_difference() {
    const FeatureStrides s = p.features_strides, t = p.features_adv_strides;
    const T* a = static_cast<const T*>(p.features) + n * s.example + first * s.pixel;
    const T* b = static_cast<const T*>(p.features_adv) + n * t.example + first * t.pixel;
    const std::int64_t a_column = column_stride(s), b_column = column_stride(t);
    const std::int64_t count = columns(), length = row_length();
    for (std::int64_t i = 0; i < rows(); ++i) {
      const T *ai = a + i * row_stride(s), *bi = b + i * row_stride(t);
      A* row = difference + i * length;
      if (a_column == 1 && b_column == 1) {
#pragma omp simd
        for (std::int64_t j = 0; j < count; ++j) row[j] = load(ai + j) - load(bi + j);
      } else {
        for (std::int64_t j = 0; j < count; ++j) {
          row[j] = load(ai + j * a_column) - load(bi + j * b_column);
        }
      }
      for (std::int64_t j = count; j < length; ++j) row[j] = 0;
    }
  }

  // M[k,j] = sum_c head[k,c] difference[c,j]
  void make_maps() {
    if (head == nullptr) return;
    if (last) {
      outer_product<A>(width, padded, p.channels, {difference, p.channels, 1}, transposed_head,
                       padded, maps, padded, false);
    } else {
      outer_product<A>(p.classes, kTile, p.channels, {head, p.channels, 1}, difference, kTile,
                       maps, kTile, false);
    }
  }

  // d[k] += sum_j measure(M[k,j])
  template <typename Measure>
  void add_distances(A* d, Measure measure) const {
    if (last) {
      for (std::int64_t j = 0; j < width; ++j) {
        const A* row = maps + j * padded;
#pragma omp simd
        for (std::int64_t k = 0; k < p.classes; ++k) d[k] += measure(row[k]);
      }
      return;
    }
    for (std::int64_t k = 0; k < p.classes; ++k) {
      const A* row = maps + k * kTile;
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t j = 0; j < kTile; ++j) sum += measure(row[j]);
      d[k] += sum;
    }
  }

  // M becomes the slope S[k,j] = factor(k) shape(M[k,j]).
  template <typename Factor, typename Shape>
  void make_slopes(Factor factor, Shape shape) {
    if (last) {
      for (std::int64_t j = 0; j < width; ++j) {
        A* row = maps + j * padded;
#pragma omp simd
        for (std::int64_t k = 0; k < p.classes; ++k) row[k] = factor(k) * shape(row[k]);
      }
      return;
    }
    for (std::int64_t k = 0; k < p.classes; ++k) {
      A* row = maps + k * kTile;
      const A f = factor(k);
#pragma omp simd
      for (std::int64_t j = 0; j < kTile; ++j) row[j] = f * shape(row[j]);
    }
  }

  // partial += S difference^T, as (K, C) for channels_last and (C, padded K) for NCHW
  void add_head_gradient(A* partial) {
    if (last) {
      outer_product<A>(p.classes, p.channels, width, {maps, 1, padded}, difference, p.channels,
                       partial, p.channels, true);
      return;
    }
    for (std::int64_t j = 0; j < kTile; ++j) {
      for (std::int64_t k = 0; k < padded; ++k) {
        transposed_maps[j * padded + k] = k < p.classes ? maps[k * kTile + j] : A(0);
      }
    }
    outer_product<A>(p.channels, padded, kTile, {difference, kTile, 1}, transposed_maps, padded,
                     partial, padded, true);
  }

  // grad_features_adv[c,j] = -sum_k head[k,c] S[k,j]; `difference` is overwritten.
  void store_feature_gradient() {
    if (head != nullptr && last) {
      outer_product<A>(width, p.channels, p.classes, {maps, padded, 1}, head, p.channels,
                       difference, p.channels, false);
    } else if (head != nullptr) {
      outer_product<A>(p.channels, kTile, p.classes, {head, 1, p.channels}, maps, kTile,
                       difference, kTile, false);
    }
    const FeatureStrides g = p.grad_strides;
    T* out = static_cast<T*>(p.grad_features_adv) + n * g.example + first * g.pixel;
    const std::int64_t column = column_stride(g), count = columns(), length = row_length();
    for (std::int64_t i = 0; i < rows(); ++i) {
      T* target = out + i * row_stride(g);
      const A* row = difference + i * length;
      if (column == 1) {
#pragma omp simd
        for (std::int64_t j = 0; j < count; ++j) store(target + j, -row[j]);
      } else {
        for (std::int64_t j = 0; j < count; ++j) store(target + j * column, -row[j]);
      }
    }
  }
};

template <typename T>
void forward(const CamDiscrepancy& p) {
  using A = acc_t<T>;
  const A* q = static_cast<const A*>(p.class_weights);
  A* total = static_cast<A*>(p.discrepancy);
  A* distances = static_cast<A*>(p.distances);
  if (channels_last(p)) Scratch<A>{p}.transpose_head();
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p))
  for (std::int64_t n = 0; n < p.examples; ++n) {
    A* d = distances + n * p.classes;
    for (std::int64_t k = 0; k < p.classes; ++k) d[k] = 0;
    for (std::int64_t first = 0; first < p.pixels; first += kTile) {
      Tile<T> tile(p, n, first);
      tile.load_difference();
      tile.make_maps();
      if (p.norm == MapNorm::l1) {
        tile.add_distances(d, [](A m) { return m < 0 ? -m : m; });
      } else {
        tile.add_distances(d, [](A m) { return m * m; });
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

// With e = class_grad, the slope S[k,j] is e_k sign(M) for l1 and e_k M / d_k for l2 (0 at d_k = 0).
template <typename T>
void backward_example(const CamDiscrepancy& p, std::int64_t n, acc_t<T>* partial) {
  using A = acc_t<T>;
  const A* e = static_cast<const A*>(p.class_grad) + n * p.classes;
  const A* d = static_cast<const A*>(p.distances) + n * p.classes;
  for (std::int64_t first = 0; first < p.pixels; first += kTile) {
    Tile<T> tile(p, n, first);
    tile.load_difference();
    tile.make_maps();
    if (p.norm == MapNorm::l1) {
      tile.make_slopes([e](std::int64_t k) { return e[k]; }, [](A m) { return sign(m); });
    } else {
      tile.make_slopes([e, d](std::int64_t k) { return d[k] > A(0) ? e[k] / d[k] : A(0); },
                       [](A m) { return m; });
    }
    if (partial != nullptr) tile.add_head_gradient(partial);
    if (p.grad_features_adv != nullptr) tile.store_feature_gradient();
  }
}

template <typename T>
void backward(const CamDiscrepancy& p) {
  using A = acc_t<T>;
  const Scratch<A> scratch{p};
  const bool last = channels_last(p);
  if (last) scratch.transpose_head();
  if (p.grad_head == nullptr) {
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p))
    for (std::int64_t n = 0; n < p.examples; ++n) backward_example<T>(p, n, nullptr);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p))
  for (std::int64_t part = 0; part < kHeadPartials; ++part) {
    A* partial = scratch.partial(part);
    for (std::int64_t i = 0; i < scratch.head_size(); ++i) partial[i] = 0;
    const std::int64_t begin = part * p.examples / kHeadPartials;
    const std::int64_t end = (part + 1) * p.examples / kHeadPartials;
    for (std::int64_t n = begin; n < end; ++n) backward_example<T>(p, n, partial);
  }
  A* grad_head = static_cast<A*>(p.grad_head);
  for (std::int64_t k = 0; k < p.classes; ++k) {
    for (std::int64_t c = 0; c < p.channels; ++c) {
      const std::int64_t i = last ? k * p.channels + c : c * padded_classes(p) + k;
      A sum = 0;
      for (std::int64_t part = 0; part < kHeadPartials; ++part) sum += scratch.partial(part)[i];
      grad_head[k * p.channels + c] = sum;
    }
  }
}

}  // namespace

std::int64_t cam_discrepancy_scratch_bytes(const CamDiscrepancy& p) {
  return p.dtype == DType::f64 ? Scratch<double>{p}.bytes() : Scratch<float>{p}.bytes();
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
