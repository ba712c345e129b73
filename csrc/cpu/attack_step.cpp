#include "arch.h"

namespace fastinterp {
namespace cpu {
namespace FI_ARCH {
namespace {

// Below this many elements starting threads costs more than the pass.
constexpr std::int64_t kSerialElements = 1 << 17;
constexpr std::int64_t kBlock = 4096;

template <typename T>
void linf(const AttackStep& p) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(p.x);
  const T* grad = static_cast<const T*>(p.grad);
  const T* origin = static_cast<const T*>(p.origin);
  T* out = static_cast<T*>(p.out);
  const A* eps = static_cast<const A*>(p.eps);
  const A* step = static_cast<const A*>(p.step_size);
  const A low = static_cast<A>(p.clip_min), high = static_cast<A>(p.clip_max);
  const std::int64_t blocks = (p.inner + kBlock - 1) / kBlock;
  const bool parallel = p.threads > 1 && p.examples * p.inner >= kSerialElements;
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads) if (parallel)
  for (std::int64_t n = 0; n < p.examples; ++n) {
    for (std::int64_t b = 0; b < blocks; ++b) {
      const A e = eps[n * p.eps_stride], s = step[n * p.step_stride];
      const std::int64_t begin = n * p.inner + b * kBlock;
      const std::int64_t last = (n + 1) * p.inner;
      const std::int64_t end = begin + kBlock < last ? begin + kBlock : last;
      // out may be x: each element is read before it is written and never again.
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) {
        store(out + i, linf_step<A>(load(x + i), load(grad + i), load(origin + i), e, s, low, high));
      }
    }
  }
}

// y = x + s g/|g|,  out = clip(o + (y - o) min(1, eps/|y - o|)); lengths are over one example.
template <typename T>
void l2(const AttackStep& p) {
  using A = acc_t<T>;
  const A low = static_cast<A>(p.clip_min), high = static_cast<A>(p.clip_max);
  const bool parallel = p.threads > 1 && p.examples * p.inner >= kSerialElements;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel)
  for (std::int64_t n = 0; n < p.examples; ++n) {
    const T* x = static_cast<const T*>(p.x) + n * p.inner;
    const T* grad = static_cast<const T*>(p.grad) + n * p.inner;
    const T* origin = static_cast<const T*>(p.origin) + n * p.inner;
    T* out = static_cast<T*>(p.out) + n * p.inner;
    const A eps = static_cast<const A*>(p.eps)[n * p.eps_stride];
    const A step = static_cast<const A*>(p.step_size)[n * p.step_stride];

    // Gradients of a mean loss are often near 1e-20: their squares underflow, so divide by the
    // largest first. Subnormal gradients have no usable direction and count as zero.
    A largest = 0;
#pragma omp simd reduction(max : largest)
    for (std::int64_t i = 0; i < p.inner; ++i) {
      const A g = load(grad + i), size = g < 0 ? -g : g;
      largest = size > largest ? size : largest;
    }
    const A down = largest < smallest_normal(A{}) ? A(0) : A(1) / largest;
    A square = 0;
#pragma omp simd reduction(+ : square)
    for (std::int64_t i = 0; i < p.inner; ++i) {
      const A g = load(grad + i) * down;
      square += g * g;
    }
    const A scale = unit_scale<A>(root(square), step);

    A distance = 0;
#pragma omp simd reduction(+ : distance)
    for (std::int64_t i = 0; i < p.inner; ++i) {
      const A d = load(x + i) + scale * (load(grad + i) * down) - load(origin + i);
      distance += d * d;
    }
    const A shrink = ball_scale<A>(root(distance), eps);
#pragma omp simd
    for (std::int64_t i = 0; i < p.inner; ++i) {
      const A o = load(origin + i);
      const A d = load(x + i) + scale * (load(grad + i) * down) - o;
      store(out + i, clamp<A>(o + shrink * d, low, high));
    }
  }
}

}  // namespace

void attack_step(const AttackStep& p) {
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.norm == StepNorm::linf ? linf<T>(p) : l2<T>(p);
  });
}

}  // namespace FI_ARCH
}  // namespace cpu
}  // namespace fastinterp
