// Every kernel file in this folder is compiled once per instruction set with FI_ARCH naming the
// variant; dispatch.cpp picks one at run time. Code here must not instantiate inline functions of
// the standard library: the linker keeps one copy of those, which could be the AVX-512 one.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../math.h"
#include "variants.h"

#ifndef FI_ARCH
#error "compile with -DFI_ARCH=<variant>; see csrc/CMakeLists.txt"
#endif

FI_VARIANT(FI_ARCH)

namespace fastinterp {
namespace cpu {
namespace {

struct BFloat16 {
  std::uint16_t bits;
};

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline float load(const BFloat16* p) {
  const std::uint32_t bits = static_cast<std::uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float* p, float v) { *p = v; }
inline void store(double* p, double v) { *p = v; }
// Round to nearest even; a NaN stays a NaN.
inline void store(BFloat16* p, float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  p->bits = static_cast<std::uint16_t>((v != v ? 0x7fc00000u : rounded) >> 16);
}

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline int thread_count() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

constexpr float smallest_normal(float) { return __FLT_MIN__; }
constexpr double smallest_normal(double) { return __DBL_MIN__; }

// Calls f(T{}) with the element type that `dtype` names. The bindings refuse other dtypes.
template <typename F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    default:
      return f(BFloat16{});
  }
}

}  // namespace
}  // namespace cpu
}  // namespace fastinterp
