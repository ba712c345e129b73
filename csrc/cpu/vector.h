// One vector of the variant's width, or one element, behind the same names: a kernel is written once
// over `Wide<T>` or `Narrow<T>` and runs on whole vectors and on what is left of a row.
#pragma once

#include "arch.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

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

// Element types of masks and of bit patterns.
template <typename A>
struct Bits;
template <>
struct Bits<float> {
  using type = std::int32_t;
};
template <>
struct Bits<double> {
  using type = std::int64_t;
};

template <typename A>
struct Vector {
  static constexpr int lanes = kVectorBytes / sizeof(A);
  typedef A type __attribute__((vector_size(kVectorBytes)));
  // The same without an alignment to rely on, for loads and stores.
  typedef A loose __attribute__((vector_size(kVectorBytes), aligned(sizeof(A)), may_alias));
  typedef typename Bits<A>::type mask __attribute__((vector_size(kVectorBytes)));
};

template <typename A>
inline typename Vector<A>::type load_vector(const A* p) {
  return *reinterpret_cast<const typename Vector<A>::loose*>(p);
}
template <typename A>
inline void store_vector(A* p, typename Vector<A>::type v) {
  *reinterpret_cast<typename Vector<A>::loose*>(p) = v;
}

typedef std::uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef std::uint16_t LooseHalves
    __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

inline Vector<float>::type load_vector(const BFloat16* p) {
  const Halves halves = *reinterpret_cast<const LooseHalves*>(p);
  return (Vector<float>::type)(__builtin_convertvector(halves, Words) << 16);
}
// Round to nearest even; a NaN stays a NaN.
inline void store_vector(BFloat16* p, Vector<float>::type v) {
  const Words bits = (Words)v, quiet = Words{} + 0x7fc00000u;
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Words kept = v != v ? quiet : rounded;
  *reinterpret_cast<LooseHalves*>(p) = __builtin_convertvector(kept >> 16, Halves);
}

template <typename T>
struct Wide {
  using A = acc_t<T>;
  using X = typename Vector<A>::type;
  using Mask = typename Vector<A>::mask;
  static constexpr int lanes = Vector<A>::lanes;

  static X load(const T* p) { return load_vector(p); }
  static X values(const A* p) { return load_vector(p); }
  static void store(T* p, X v) { store_vector(p, v); }
  static void put(A* p, X v) { store_vector(p, v); }
  static X constant(A v) { return X{} + v; }

  // f of every lane; a loop the compiler vectorises.
  template <typename F>
  static X each(X v, F f) {
    alignas(64) A lane[lanes];
    put(lane, v);
#pragma omp simd
    for (int i = 0; i < lanes; ++i) lane[i] = f(lane[i]);
    return values(lane);
  }

  // One bit per lane, lane 0 lowest; p is the byte that holds the first one.
  static Mask load_bits(const std::uint8_t* p, std::int64_t first) {
    unsigned bits = p[0];
    if (lanes > 8) bits |= p[1] << 8;
    Mask power;
    for (int i = 0; i < lanes; ++i) power[i] = typename Bits<A>::type(1) << i;
    return ((Mask{} + static_cast<typename Bits<A>::type>(bits >> (first % 8))) & power) != 0;
  }
  static unsigned bits_of(Mask m) {
#if defined(__AVX512F__)
    if (sizeof(A) == 4) return _mm512_movepi32_mask((__m512i)m);
    return _mm512_movepi64_mask((__m512i)m);
#else
    unsigned bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= (m[i] & 1) << i;
    return bits;
#endif
  }
};

template <typename T>
struct Narrow {
  using A = acc_t<T>;
  using X = A;
  using Mask = bool;
  static constexpr int lanes = 1;

  static X load(const T* p) { return cpu::load(p); }
  static X values(const A* p) { return *p; }
  static void store(T* p, X v) { cpu::store(p, v); }
  static void put(A* p, X v) { *p = v; }
  static X constant(A v) { return v; }
  template <typename F>
  static X each(X v, F f) {
    return f(v);
  }
  static Mask load_bits(const std::uint8_t* p, std::int64_t first) { return p[0] >> first % 8 & 1; }
  static unsigned bits_of(Mask m) { return m; }
};

}  // namespace
}  // namespace cpu
}  // namespace fastinterp
