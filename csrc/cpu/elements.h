// What the normalisation kernels do with elements, written once for vectors and single numbers.
#pragma once

#include "../activations.h"
#include "vector.h"

namespace fastinterp {
namespace cpu {
namespace {

// A kernel is written once over P and runs on whole vectors, Wide<T>, and on what is left of a row,
// Narrow<T>.
template <typename T>
struct Wide {
  using A = acc_t<T>;
  using X = typename Vector<A>::type;
  using Mask = decltype(X{} < X{});
  static constexpr int lanes = Vector<A>::lanes;

  static X load(const T* p) { return Pack<X>::load_from(p); }
  static void store(T* p, X v) { Pack<X>::store_to(p, v); }
  static X values(const A* p) { return load_vector(p); }
  static void put(A* p, X v) { store_vector(p, v); }

  // f of every lane, in a loop the compiler vectorises.
  template <typename F>
  static X each(X v, F f) {
    alignas(64) A lane[lanes];
    put(lane, v);
#pragma omp simd
    for (int i = 0; i < lanes; ++i) lane[i] = f(lane[i]);
    return values(lane);
  }

  // One bit per lane, lane 0 lowest; p is the byte that holds the bit of lane `first` of the row.
  static Mask load_bits(const std::uint8_t* p, std::int64_t first) {
    std::int32_t bits = p[0];
    if (lanes > 8) bits |= p[1] << 8;
    bits >>= first % 8;
    Mask mask{};
    for (int i = 0; i < lanes; ++i) mask[i] = bits & (1 << i);
    return mask != 0;
  }
  static unsigned bits_of(Mask m) {
    unsigned bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= static_cast<unsigned>(m[i] & 1) << i;
    return bits;
  }
};

template <typename T>
struct Narrow {
  using A = acc_t<T>;
  using X = A;
  using Mask = bool;
  static constexpr int lanes = 1;

  static X load(const T* p) { return cpu::load(p); }
  static void store(T* p, X v) { cpu::store(p, v); }
  static X values(const A* p) { return *p; }
  static void put(A* p, X v) { *p = v; }
  template <typename F>
  static X each(X v, F f) {
    return f(v);
  }
  static Mask load_bits(const std::uint8_t* p, std::int64_t first) { return *p >> first % 8 & 1; }
  static unsigned bits_of(Mask m) { return m; }
};

// Large, and used in many places.
#define FI_NOINLINE __attribute__((noinline))

// phi and its derivatives over P.
template <typename T, Activation K>
struct Phi {
  using A = acc_t<T>;
  static constexpr bool smooth = is_smooth<K>;

  template <typename P>
  static typename P::X value(typename P::X z, [[maybe_unused]] A alpha) {
    if constexpr (smooth) {
      return smooth_value<P>(z, alpha);
    } else if constexpr (K == Activation::identity) {
      return z;
    } else if constexpr (K == Activation::relu) {
      return z < typename P::X{} ? typename P::X{} : z;
    } else {
      return z < typename P::X{} ? alpha * z : z;
    }
  }
  // phi'(z), as the sign of z where that is all there is to it.
  template <typename P>
  static auto slope(typename P::X z, [[maybe_unused]] A alpha) {
    if constexpr (smooth) {
      return smooth_slope<P>(z, alpha);
    } else {
      return z > typename P::X{};
    }
  }
  // phi'(z) v, given the above
  template <typename P, typename Slope>
  static typename P::X times([[maybe_unused]] Slope slope, typename P::X v,
                             [[maybe_unused]] A alpha) {
    if constexpr (smooth) {
      return slope * v;
    } else {
      return gated<K>(slope, v, alpha);
    }
  }
  // of a smooth phi
  template <typename P>
  static FI_NOINLINE typename P::X curvature(typename P::X z, A alpha) {
    return P::each(z, [alpha](A e) { return activation_curvature<K>(e, alpha); });
  }

 private:
  template <typename P>
  static FI_NOINLINE typename P::X smooth_value(typename P::X z, A alpha) {
    return P::each(z, [alpha](A e) { return activation_value<K>(e, alpha); });
  }
  template <typename P>
  static FI_NOINLINE typename P::X smooth_slope(typename P::X z, A alpha) {
    return P::each(z, [alpha](A e) { return activation_slope<K>(e, alpha); });
  }
};

}  // namespace
}  // namespace cpu
}  // namespace fastinterp
