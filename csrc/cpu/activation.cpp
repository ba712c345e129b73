#include "../activations.h"

#include "arch.h"

namespace fastinterp {
namespace cpu {
namespace FI_ARCH {
namespace {

constexpr std::int64_t kBlock = 4096;
constexpr std::int64_t kSerialElements = 1 << 14;  // below which starting threads costs more

// f(begin, end) over blocks of the elements
template <typename F>
void for_blocks(const ActivationPass& p, F f) {
  const std::int64_t blocks = (p.count + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(p.threads) \
    if (p.threads > 1 && p.count >= kSerialElements)
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t begin = b * kBlock;
    f(begin, begin + kBlock < p.count ? begin + kBlock : p.count);
  }
}

template <Activation K>
struct Kind {
  static constexpr Activation value = K;
};

// Calls f(T{}, Kind{}) with the element type and the activation of p.
template <typename F>
void with_types(const ActivationPass& p, F f) {
  with_dtype(p.dtype, [&](auto element) {
    switch (p.kind) {
      case Activation::softplus:
        return f(element, Kind<Activation::softplus>{});
      case Activation::silu:
        return f(element, Kind<Activation::silu>{});
      default:
        return f(element, Kind<Activation::gelu>{});
    }
  });
}

}  // namespace

void activation(const ActivationPass& p) {
  with_types(p, [&](auto element, auto kind) {
    using T = decltype(element);
    using A = acc_t<T>;
    constexpr Activation K = decltype(kind)::value;
    const T* z = static_cast<const T*>(p.z);
    T* y = static_cast<T*>(p.y);
    const A alpha = static_cast<A>(p.alpha);
    for_blocks(p, [=](std::int64_t begin, std::int64_t end) {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) {
        store(y + i, activation_value<K, A>(load(z + i), alpha));
      }
    });
  });
}

void activation_backward(const ActivationPass& p) {
  with_types(p, [&](auto element, auto kind) {
    using T = decltype(element);
    using A = acc_t<T>;
    constexpr Activation K = decltype(kind)::value;
    const T *z = static_cast<const T*>(p.z), *gy = static_cast<const T*>(p.gy);
    T* gz = static_cast<T*>(p.gz);
    const A alpha = static_cast<A>(p.alpha);
    for_blocks(p, [=](std::int64_t begin, std::int64_t end) {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) {
        store(gz + i, activation_slope<K, A>(load(z + i), alpha) * load(gy + i));
      }
    });
  });
}

void activation_backward_backward(const ActivationPass& p) {
  with_types(p, [&](auto element, auto kind) {
    using T = decltype(element);
    using A = acc_t<T>;
    constexpr Activation K = decltype(kind)::value;
    const T *z = static_cast<const T*>(p.z), *gy = static_cast<const T*>(p.gy);
    const T* v = static_cast<const T*>(p.v);
    T *ggy = static_cast<T*>(p.ggy), *gz2 = static_cast<T*>(p.gz2);
    const A alpha = static_cast<A>(p.alpha);
    for_blocks(p, [=](std::int64_t begin, std::int64_t end) {
      if (ggy != nullptr && gz2 != nullptr) {
#pragma omp simd
        for (std::int64_t i = begin; i < end; ++i) {
          const A at = load(z + i), along = load(v + i);
          store(ggy + i, activation_slope<K, A>(at, alpha) * along);
          store(gz2 + i, activation_curvature<K, A>(at, alpha) * load(gy + i) * along);
        }
      } else if (ggy != nullptr) {
#pragma omp simd
        for (std::int64_t i = begin; i < end; ++i) {
          store(ggy + i, activation_slope<K, A>(load(z + i), alpha) * load(v + i));
        }
      } else if (gz2 != nullptr) {
#pragma omp simd
        for (std::int64_t i = begin; i < end; ++i) {
          store(gz2 + i,
                activation_curvature<K, A>(load(z + i), alpha) * load(gy + i) * load(v + i));
        }
      }
    });
  });
}

}  // namespace FI_ARCH
}  // namespace cpu
}  // namespace fastinterp
