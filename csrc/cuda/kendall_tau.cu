// Every pair of a row is compared once. A row is cut into tiles; a thread holds one element of a tile
// and meets half of its own tile and half of the other tiles, going round: element i meets i + 1,
// i + 2, ... modulo their number. So all threads, and all blocks, have the same work.
#include "../kernels.h"
#include "../math.h"
#include "launch.cuh"

namespace fastinterp {
namespace cuda {
namespace {

constexpr int kTile = 256;  // elements, and threads of a block

// How many of the elements (or tiles) after number i it meets, of `count` in a ring: each pair once.
__device__ __forceinline__ std::int64_t half_ring(std::int64_t i, std::int64_t count) {
  return count / 2 - (count % 2 == 0 && i >= count / 2);
}

template <typename A>
struct Counter {
  A a, b;
  int agreement = 0, differ_a = 0, differ_b = 0;  // of one thread: fewer than 2^31 columns

  __device__ __forceinline__ void meet(A other_a, A other_b) {
    const int sign_a = (a > other_a) - (a < other_a), sign_b = (b > other_b) - (b < other_b);
    agreement += sign_a * sign_b;
    differ_a += a != other_a;
    differ_b += b != other_b;
  }
};

__device__ __forceinline__ std::int64_t warp_sum(std::int64_t v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    v += __shfl_xor_sync(0xffffffffu, static_cast<long long>(v), offset);
  }
  return v;
}

// The block's sums, in thread 0. blockDim.x is a multiple of the warp size.
__device__ PairCounts block_sum(PairCounts c) {
  __shared__ PairCounts partial[kTile / kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  c = {warp_sum(c.agreement), warp_sum(c.differ_a), warp_sum(c.differ_b), warp_sum(c.nans)};
  if (lane == 0) partial[warp] = c;
  __syncthreads();
  PairCounts total{0, 0, 0, 0};
  if (threadIdx.x == 0) {
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
      total.agreement += partial[w].agreement;
      total.differ_a += partial[w].differ_a;
      total.differ_b += partial[w].differ_b;
      total.nans += partial[w].nans;
    }
  }
  return total;
}

// Block (row, tile). `partial` is (rows, tiles), or null when a row is one tile.
template <typename A>
__global__ void __launch_bounds__(kTile)
    pairs_kernel(const A* a, const A* b, std::int64_t rows, std::int64_t columns,
                 std::int64_t tiles, PairCounts* partial, double* tau) {
  // Twice the tile, so that i + k needs no modulo.
  __shared__ A shared_a[2 * kTile], shared_b[2 * kTile];
  const int i = threadIdx.x;
  for (std::int64_t block = blockIdx.x; block < rows * tiles; block += gridDim.x) {
    const std::int64_t row = block / tiles, tile = block % tiles;
    const A *row_a = a + row * columns, *row_b = b + row * columns;
    const std::int64_t begin = tile * kTile;
    const int own = static_cast<int>(columns - begin < kTile ? columns - begin : kTile);
    __syncthreads();  // the tiles of the block before may still be read
    Counter<A> counter{};
    if (i < own) {
      counter.a = shared_a[i] = shared_a[i + own] = row_a[begin + i];
      counter.b = shared_b[i] = shared_b[i + own] = row_b[begin + i];
    }
    __syncthreads();
    if (i < own) {
      const int half = static_cast<int>(half_ring(i, own));
#pragma unroll 4
      for (int k = 1; k <= half; ++k) counter.meet(shared_a[i + k], shared_b[i + k]);
    }
    const std::int64_t partners = half_ring(tile, tiles);
    for (std::int64_t k = 1; k <= partners; ++k) {
      const std::int64_t other_begin = (tile + k) % tiles * kTile;
      const int other =
          static_cast<int>(columns - other_begin < kTile ? columns - other_begin : kTile);
      __syncthreads();
      if (i < other) {
        shared_a[i] = row_a[other_begin + i];
        shared_b[i] = row_b[other_begin + i];
      }
      __syncthreads();
      if (i < own) {
#pragma unroll 4
        for (int j = 0; j < other; ++j) counter.meet(shared_a[j], shared_b[j]);
      }
    }
    const int nans = (counter.a != counter.a) + (counter.b != counter.b);
    const PairCounts total =
        block_sum({counter.agreement, counter.differ_a, counter.differ_b, nans});
    if (i == 0) {
      if (partial != nullptr) {
        partial[block] = total;
      } else {
        tau[row] = kendall_tau_b(total);
      }
    }
  }
}

// One block a row: the sums over its tiles.
__global__ void __launch_bounds__(kTile)
    totals_kernel(const PairCounts* partial, std::int64_t rows, std::int64_t tiles, double* tau) {
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    __syncthreads();  // the partials of the row before may still be read
    PairCounts mine{0, 0, 0, 0};
    for (std::int64_t t = threadIdx.x; t < tiles; t += blockDim.x) {
      const PairCounts& c = partial[row * tiles + t];
      mine.agreement += c.agreement;
      mine.differ_a += c.differ_a;
      mine.differ_b += c.differ_b;
      mine.nans += c.nans;
    }
    const PairCounts total = block_sum(mine);
    if (threadIdx.x == 0) tau[row] = kendall_tau_b(total);
  }
}

std::int64_t tiles_of(std::int64_t columns) {
  return columns <= kTile ? 1 : (columns + kTile - 1) / kTile;
}

template <typename A>
void run(const KendallTau& p, cudaStream_t stream) {
  const std::int64_t tiles = tiles_of(p.columns);
  PairCounts* partial = tiles == 1 ? nullptr : static_cast<PairCounts*>(p.scratch);
  launch(pairs_kernel<A>, grid_size(p.rows * tiles), block_size(p.columns, kTile), stream,
         static_cast<const A*>(p.a), static_cast<const A*>(p.b), p.rows, p.columns, tiles, partial,
         p.tau);
  if (tiles > 1) {
    launch(totals_kernel, grid_size(p.rows), block_size(tiles, kTile), stream, partial, p.rows,
           tiles, p.tau);
  }
}

}  // namespace

std::int64_t kendall_tau_scratch_bytes(const KendallTau& p) {
  const std::int64_t tiles = tiles_of(p.columns);
  return tiles == 1 ? 0 : p.rows * tiles * static_cast<std::int64_t>(sizeof(PairCounts));
}

int kendall_tau(const KendallTau& p, void* stream) {
  if (p.rows == 0) return cudaSuccess;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32:
      run<float>(p, s);
      break;
    case DType::f64:
      run<double>(p, s);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fastinterp
