// Vectors as wide as the instruction set's registers. Comparisons give a mask, and mask ? a : b
// selects, so that an expression may be written once for vectors and for single numbers.
#pragma once

#include "arch.h"

namespace fastinterp {
namespace cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
struct Vector {
  static constexpr int lanes = kVectorBytes / sizeof(A);
  typedef A type __attribute__((vector_size(kVectorBytes)));
  // The same without an alignment to rely on, for loads and stores.
  typedef A loose __attribute__((vector_size(kVectorBytes), aligned(sizeof(A)), may_alias));
};

template <typename A>
inline typename Vector<A>::type load_vector(const A* p) {
  return *reinterpret_cast<const typename Vector<A>::loose*>(p);
}
template <typename A>
inline void store_vector(A* p, typename Vector<A>::type v) {
  *reinterpret_cast<typename Vector<A>::loose*>(p) = v;
}

// Vectors of narrower numbers, as many as Vector<A> has, for what is converted on the way.
template <typename A, typename Narrow>
struct Beside {
  typedef Narrow type __attribute__((vector_size(Vector<A>::lanes * sizeof(Narrow))));
  typedef Narrow loose __attribute__((vector_size(Vector<A>::lanes * sizeof(Narrow)),
                                      aligned(sizeof(Narrow)), may_alias));
};

// Loads and stores of P, a number of the accumulation type or a vector of them, from any dtype.
template <typename P>
struct Pack {  // a single number
  static constexpr int lanes = 1;
  template <typename T>
  static P load_from(const T* p) {
    return load(p);
  }
  static P load_from(const std::uint8_t* p) { return static_cast<P>(*p); }
  template <typename T>
  static void store_to(T* p, P v) {
    store(p, v);
  }
  static void store_to(std::uint8_t* p, P v) {
    *p = static_cast<std::uint8_t>(static_cast<int>(v));
  }
};

template <typename A>
struct VectorPack {
  using V = typename Vector<A>::type;
  static constexpr int lanes = Vector<A>::lanes;
  static V load_from(const A* p) { return load_vector(p); }
  static V load_from(const std::uint8_t* p) {
    const typename Beside<A, std::uint8_t>::type v =
        *reinterpret_cast<const typename Beside<A, std::uint8_t>::loose*>(p);
    // Doubling the width at each step is what GCC vectorises.
    const auto half = __builtin_convertvector(v, typename Beside<A, std::uint16_t>::type);
    return __builtin_convertvector(
        __builtin_convertvector(half, typename Beside<A, std::int32_t>::type), V);
  }
  static void store_to(A* p, V v) { store_vector(p, v); }
  static void store_to(std::uint8_t* p, V v) {
    using Bytes = typename Beside<A, std::uint8_t>::type;
    using Words = typename Beside<A, std::int32_t>::type;
    *reinterpret_cast<typename Beside<A, std::uint8_t>::loose*>(p) =
        __builtin_convertvector(__builtin_convertvector(v, Words), Bytes);
  }
  static V load_from(const BFloat16* p) {
    using Wide = typename Beside<A, std::uint32_t>::type;
    const typename Beside<A, std::uint16_t>::type v =
        *reinterpret_cast<const typename Beside<A, std::uint16_t>::loose*>(p);
    return reinterpret_cast<V>(__builtin_convertvector(v, Wide) << 16);
  }
  static void store_to(BFloat16* p, V v) {
    using Wide = typename Beside<A, std::uint32_t>::type;
    using Narrow = typename Beside<A, std::uint16_t>::type;
    const Wide bits = reinterpret_cast<Wide>(v);
    const Wide rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Wide chosen = v != v ? Wide{} + 0x7fc00000u : rounded;
    *reinterpret_cast<typename Beside<A, std::uint16_t>::loose*>(p) =
        __builtin_convertvector(chosen >> 16, Narrow);
  }
};
template <>
struct Pack<Vector<float>::type> : VectorPack<float> {};
template <>
struct Pack<Vector<double>::type> : VectorPack<double> {};

}  // namespace
}  // namespace cpu
}  // namespace fastinterp
