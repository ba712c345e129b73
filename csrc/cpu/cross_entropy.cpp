#include "../activations.h"

#include "arch.h"

namespace fastinterp {
namespace cpu {
namespace FI_ARCH {
namespace {

constexpr std::int64_t kSerialElements = 1 << 14;  // below which starting threads costs more

inline float logarithm(float v) { return __builtin_logf(v); }
inline double logarithm(double v) { return __builtin_log(v); }

bool parallel(const CrossEntropy& p) {
  return p.threads > 1 && p.examples * p.classes >= kSerialElements;
}

template <typename T>
std::int64_t forward(const CrossEntropy& p) {
  using A = acc_t<T>;
  const A smoothing = static_cast<A>(p.smoothing);
  A* losses = static_cast<A*>(p.losses);
  std::int64_t bad = p.examples;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p)) \
    reduction(min : bad)
  for (std::int64_t n = 0; n < p.examples; ++n) {
    const T* z = static_cast<const T*>(p.logits) + n * p.classes;
    const std::int64_t target = p.target[n];
    const bool counts = target != p.ignore_index;
    A* shift = static_cast<A*>(p.shift) + 2 * n;
    A largest = -A(__builtin_inf());
#pragma omp simd reduction(max : largest)
    for (std::int64_t k = 0; k < p.classes; ++k) {
      const A v = load(z + k);
      largest = v > largest ? v : largest;
    }
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (std::int64_t k = 0; k < p.classes; ++k) total += exponential(load(z + k) - largest);
    const A log_total = logarithm(total);
    shift[0] = largest;
    shift[1] = log_total;
    losses[n] = 0;
    if (!counts) continue;
    if (target < 0 || target >= p.classes) {
      bad = n < bad ? n : bad;
      continue;
    }
    A loss = log_total - (load(z + target) - largest);
    if (smoothing != 0) {
      A sum = 0;  // of -log p; not taken without smoothing, as it may be infinite
#pragma omp simd reduction(+ : sum)
      for (std::int64_t k = 0; k < p.classes; ++k) sum += log_total - (load(z + k) - largest);
      loss = (1 - smoothing) * loss + smoothing / static_cast<A>(p.classes) * sum;
    }
    losses[n] = loss;
  }
  double sum = 0;
  std::int64_t count = 0;
  for (std::int64_t n = 0; n < p.examples; ++n) {
    sum += losses[n];
    count += p.target[n] != p.ignore_index;
  }
  const double scale = p.reduction == Reduction::mean ? static_cast<double>(count) : 1.0;
  *static_cast<A*>(p.scale) = static_cast<A>(1 / scale);
  if (p.total != nullptr) *static_cast<A*>(p.total) = static_cast<A>(sum / scale);
  return bad < p.examples ? bad : -1;
}

// One example: p, t and c of kernels.h.
template <typename T>
struct Row {
  using A = acc_t<T>;
  const T* z;
  A largest, log_total, scale, c, spread;
  std::int64_t target, start;  // start: of the row in (N, K) tensors
  bool counts;

  Row(const CrossEntropy& p, std::int64_t n)
      : z(static_cast<const T*>(p.logits) + n * p.classes),
        largest(static_cast<const A*>(p.shift)[2 * n]),
        log_total(static_cast<const A*>(p.shift)[2 * n + 1]),
        scale(*static_cast<const A*>(p.scale)),
        c(static_cast<const A*>(p.grad)[n * p.grad_stride] * scale),
        spread(static_cast<A>(p.smoothing) / static_cast<A>(p.classes)),
        target(p.target[n]),
        start(n * p.classes),
        counts(target != p.ignore_index) {}

  A probability(std::int64_t k) const { return exponential(load(z + k) - largest - log_total); }
};

template <typename T>
void backward(const CrossEntropy& p) {
  using A = acc_t<T>;
  const A weight = 1 - static_cast<A>(p.smoothing);
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p))
  for (std::int64_t n = 0; n < p.examples; ++n) {
    const Row<T> row(p, n);
    T* out = static_cast<T*>(p.grad_logits) + row.start;
    if (!row.counts) {
      for (std::int64_t k = 0; k < p.classes; ++k) out[k] = T{};
      continue;
    }
#pragma omp simd
    for (std::int64_t k = 0; k < p.classes; ++k) {
      store(out + k, row.c * (row.probability(k) - row.spread));
    }
    const A p_target = row.probability(row.target);
    store(out + row.target, row.c * (p_target - row.spread - weight));
  }
}

template <typename T>
void backward_backward(const CrossEntropy& p) {
  using A = acc_t<T>;
  const A weight = 1 - static_cast<A>(p.smoothing);
  A* grad_grad = static_cast<A*>(p.grad_grad);
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p))
  for (std::int64_t n = 0; n < p.examples; ++n) {
    const Row<T> row(p, n);
    const T* v = static_cast<const T*>(p.v) + row.start;
    T* out = p.grad_logits == nullptr ? nullptr : static_cast<T*>(p.grad_logits) + row.start;
    if (!row.counts) {
      if (grad_grad != nullptr) grad_grad[n] = 0;
      for (std::int64_t k = 0; out != nullptr && k < p.classes; ++k) out[k] = T{};
      continue;
    }
    A mean = 0, sum = 0;  // sum_k p v, sum_k v
#pragma omp simd reduction(+ : mean, sum)
    for (std::int64_t k = 0; k < p.classes; ++k) {
      const A along = load(v + k);
      mean += row.probability(k) * along;
      sum += along;
    }
    if (grad_grad != nullptr) {
      const A at_target = load(v + row.target);
      grad_grad[n] = row.scale * (mean - weight * at_target - row.spread * sum);
    }
    if (out == nullptr) continue;
#pragma omp simd
    for (std::int64_t k = 0; k < p.classes; ++k) {
      store(out + k, row.c * row.probability(k) * (load(v + k) - mean));
    }
  }
}

}  // namespace

std::int64_t cross_entropy(const CrossEntropy& p) {
  std::int64_t bad = -1;
  with_dtype(p.dtype, [&](auto element) { bad = forward<decltype(element)>(p); });
  return bad;
}

void cross_entropy_backward(const CrossEntropy& p) {
  with_dtype(p.dtype, [&](auto element) { backward<decltype(element)>(p); });
}

void cross_entropy_backward_backward(const CrossEntropy& p) {
  with_dtype(p.dtype, [&](auto element) { backward_backward<decltype(element)>(p); });
}

}  // namespace FI_ARCH
}  // namespace cpu
}  // namespace fastinterp
