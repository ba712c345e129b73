// A register-tiled product of small matrices, nearly all the arithmetic of the CAM kernels.
#pragma once

#include "vector.h"

namespace fastinterp {
namespace cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 4;

// A matrix read at a[i * row + l * column].
template <typename A>
struct Matrix {
  const A* data;
  std::int64_t row, column;
};

template <typename A, int R, int Q>
inline void outer_tile(std::int64_t depth, Matrix<A> a, const A* b, std::int64_t b_row, A* c,
                       std::int64_t c_row, bool accumulate) {
  using V = typename Vector<A>::type;
  constexpr int lanes = Vector<A>::lanes;
  V sum[R][Q];
  for (int r = 0; r < R; ++r) {
    for (int q = 0; q < Q; ++q) {
      sum[r][q] = accumulate ? load_vector(c + r * c_row + q * lanes) : V{};
    }
  }
  for (std::int64_t l = 0; l < depth; ++l) {
    V row[Q];
    for (int q = 0; q < Q; ++q) row[q] = load_vector(b + l * b_row + q * lanes);
    for (int r = 0; r < R; ++r) {
      const A factor = a.data[r * a.row + l * a.column];
      for (int q = 0; q < Q; ++q) sum[r][q] += factor * row[q];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int q = 0; q < Q; ++q) store_vector(c + r * c_row + q * lanes, sum[r][q]);
  }
}

template <typename A, int R>
inline void outer_rows(std::int64_t columns, std::int64_t depth, Matrix<A> a, const A* b,
                       std::int64_t b_row, A* c, std::int64_t c_row, bool accumulate) {
  constexpr int lanes = Vector<A>::lanes;
  std::int64_t j = 0;
  for (; j + kTileVectors * lanes <= columns; j += kTileVectors * lanes) {
    outer_tile<A, R, kTileVectors>(depth, a, b + j, b_row, c + j, c_row, accumulate);
  }
  for (; j + lanes <= columns; j += lanes) {
    outer_tile<A, R, 1>(depth, a, b + j, b_row, c + j, c_row, accumulate);
  }
  for (; j < columns; ++j) {
    for (int r = 0; r < R; ++r) {
      A sum = accumulate ? c[r * c_row + j] : A(0);
      for (std::int64_t l = 0; l < depth; ++l) {
        sum += a.data[r * a.row + l * a.column] * b[l * b_row + j];
      }
      c[r * c_row + j] = sum;
    }
  }
}

template <typename A, int R>
inline std::int64_t outer_blocks(std::int64_t i, std::int64_t rows, std::int64_t columns,
                                 std::int64_t depth, Matrix<A> a, const A* b, std::int64_t b_row,
                                 A* c, std::int64_t c_row, bool accumulate) {
  for (; i + R <= rows; i += R) {
    const Matrix<A> part{a.data + i * a.row, a.row, a.column};
    outer_rows<A, R>(columns, depth, part, b, b_row, c + i * c_row, c_row, accumulate);
  }
  return i;
}

// c[i,j] (+)= sum_l a[i,l] b[l,j], vectorised over j: rows of b and c are contiguous. A product one
// vector wide takes more rows at a time, for as many independent sums in flight.
template <typename A>
void outer_product(std::int64_t rows, std::int64_t columns, std::int64_t depth, Matrix<A> a,
                   const A* b, std::int64_t b_row, A* c, std::int64_t c_row, bool accumulate) {
  std::int64_t i = 0;
  if (columns <= Vector<A>::lanes) {
    i = outer_blocks<A, 2 * kTileRows>(i, rows, columns, depth, a, b, b_row, c, c_row, accumulate);
  }
  i = outer_blocks<A, kTileRows>(i, rows, columns, depth, a, b, b_row, c, c_row, accumulate);
  outer_blocks<A, 1>(i, rows, columns, depth, a, b, b_row, c, c_row, accumulate);
}

}  // namespace
}  // namespace cpu
}  // namespace fastinterp
