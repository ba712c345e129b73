// Tiles of a tensor with channels, and sums over each of them, for NCHW and channels_last alike; what
// fastinterp/triton/_channel_tiles.py is for Triton.
//
// The dense tensor is seen as rows of elements that follow each other in memory, as the bit mask is:
//     NCHW           a row is a plane of one channel
//     channels_last  a row is the channels of a pixel, of several where 64 / C is whole
// A thread takes 16 bytes of a row at a time, a piece. A block has one channel (NCHW) or some pieces
// of every row (channels_last), and a chunk of the items in it: pieces, or rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "../kernels.h"
#include "../math.h"
#include "launch.cuh"

namespace fastinterp {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxColumns = 8;        // pieces of a row side by side: 128 bytes
constexpr std::int64_t kBlocks = 1024;  // enough for any device; fixed, so that results are the same on all
constexpr int kSamples = 8;
constexpr int kChannels = 8;  // of a block between the passes: 32 bytes of float, a sector

template <typename T>
constexpr int kWidth = 16 / sizeof(T);

template <typename T>
struct alignas(16) Piece {
  T values[kWidth<T>];
};

struct Cut {
  std::int64_t channels, length;  // elements of a row
  unsigned rows, row_pieces;      // pieces: whole octets, so that a byte of the mask is not divided
  unsigned items;                 // of a block
  unsigned per_tile;              // items
  int columns;                    // 1 for NCHW
  unsigned blocks, chunks;        // the grid
  std::int64_t steps;             // tiles of a chunk
  bool folded;                    // a row has several pixels
  bool aligned;                   // whole pieces may be read at once

  std::int64_t lanes(bool last) const { return last ? length : channels; }
  // Rows of the table (parts, channels) that partial sums (chunks, lanes) are.
  std::int64_t parts(bool last) const { return chunks * lanes(last) / channels; }
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline Cut cut_of(const BatchNormAct& p, int width) {
  Cut c{};
  const std::int64_t count = p.examples * p.pixels;
  std::int64_t rows = p.examples * p.channels;
  c.channels = p.channels;
  c.length = p.pixels;
  if (p.channels_last) {
    const std::int64_t several = p.channels < 64 && 64 % p.channels == 0 ? 64 / p.channels : 1;
    const std::int64_t fold = count % several == 0 ? several : 1;
    rows = count / fold;
    c.length = p.channels * fold;
    c.folded = fold > 1;
  }
  c.rows = static_cast<unsigned>(rows);
  c.row_pieces = static_cast<unsigned>(ceil_div(c.length, 8) * (8 / width));
  if (p.channels_last) {
    c.columns = 8 / width;
    while (c.columns < kMaxColumns && c.columns < static_cast<int>(c.row_pieces)) c.columns *= 2;
    c.items = c.rows;
    c.blocks = static_cast<unsigned>(ceil_div(c.row_pieces, c.columns));
  } else {
    c.columns = 1;
    c.items = static_cast<unsigned>(p.examples) * c.row_pieces;
    c.blocks = static_cast<unsigned>(p.channels);
  }
  c.per_tile = kThreads / c.columns;
  const std::int64_t tiles = ceil_div(c.items, c.per_tile);
  const std::int64_t wanted = kBlocks / c.blocks > 1 ? kBlocks / c.blocks : 1;
  const std::int64_t least = p.channels_last ? 2 : 1;  // partial sums are as wide as a row
  c.steps = ceil_div(tiles, wanted) > least ? ceil_div(tiles, wanted) : least;
  c.chunks = static_cast<unsigned>(tiles > 0 ? ceil_div(tiles, c.steps) : 1);
  const auto address = [](const void* data) { return reinterpret_cast<std::uintptr_t>(data); };
  const std::uintptr_t all = address(p.x) | address(p.residual) | address(p.y) | address(p.gy) |
                             address(p.addend) | address(p.gx) | address(p.gresidual) |
                             address(p.v) | address(p.u) | address(p.ggy) | address(p.gx2) |
                             address(p.gresidual2);
  c.aligned = c.length % width == 0 && all % 16 == 0;
  return c;
}

// Where a piece lies.
struct Place {
  std::int64_t element;
  std::int64_t byte;  // of the mask
  int bit;            // of that byte, the piece's first
  int count;          // elements of the piece that exist
};

// Item number `item` of this block, at this thread's column; nothing from `end` on.
template <typename T, bool kLast>
__device__ __forceinline__ Place place(const Cut& c, std::int64_t item, std::int64_t end) {
  constexpr int width = kWidth<T>;
  if (item >= end) return {0, 0, 0, 0};
  std::int64_t row;
  unsigned piece;
  if constexpr (kLast) {
    row = item;
    piece = blockIdx.x * c.columns + threadIdx.x % c.columns;
    if (piece >= c.row_pieces) return {0, 0, 0, 0};
  } else {
    const unsigned i = static_cast<unsigned>(item), n = i / c.row_pieces;
    row = n * c.channels + blockIdx.x;
    piece = i - n * c.row_pieces;
  }
  const std::int64_t j = static_cast<std::int64_t>(piece) * width, rest = c.length - j;
  return {row * c.length + j, row * ((c.length + 7) / 8) + j / 8, static_cast<int>(j % 8),
          rest < 0 ? 0 : rest < width ? static_cast<int>(rest) : width};
}

// Zeros where there is no tensor or no element.
template <typename T>
__device__ __forceinline__ Piece<T> load(const void* data, const Place& at, bool aligned) {
  constexpr int width = kWidth<T>;
  const T* p = static_cast<const T*>(data) + at.element;
  Piece<T> piece;
  if (data != nullptr && aligned && at.count == width) {
    const uint4 bytes = *reinterpret_cast<const uint4*>(p);
    memcpy(&piece, &bytes, sizeof piece);
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      piece.values[i] = data != nullptr && i < at.count ? p[i] : static_cast<T>(0.0f);
    }
  }
  return piece;
}

template <typename T>
__device__ __forceinline__ void store(void* data, const Place& at, const Piece<T>& piece,
                                      bool aligned) {
  constexpr int width = kWidth<T>;
  if (data == nullptr) return;
  T* p = static_cast<T*>(data) + at.element;
  if (aligned && at.count == width) {
    uint4 bytes;
    memcpy(&bytes, &piece, sizeof piece);
    *reinterpret_cast<uint4*>(p) = bytes;
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      if (i < at.count) p[i] = piece.values[i];
    }
  }
}

// The piece's bits of the mask, its first element lowest.
template <typename T>
__device__ __forceinline__ unsigned load_bits(const void* mask, const Place& at) {
  if (at.count == 0) return 0;
  return static_cast<const std::uint8_t*>(mask)[at.byte] >> at.bit;
}

// A byte is made by the neighbouring threads whose pieces it covers; every thread must come here.
template <typename T>
__device__ __forceinline__ void store_bits(void* mask, const Place& at, unsigned bits) {
  bits <<= at.bit;
#pragma unroll
  for (int s = 1; s < 8 / kWidth<T>; s *= 2) bits |= __shfl_xor_sync(0xffffffffu, bits, s);
  if (at.count > 0 && at.bit == 0) {
    static_cast<std::uint8_t*>(mask)[at.byte] = static_cast<std::uint8_t>(bits);
  }
}

// f(item, end) for the items of this thread, kBatch of them apart by *stride at a time.
template <bool kLast, int kBatch, typename F>
__device__ __forceinline__ void each_item(const Cut& c, F f) {
  const std::int64_t begin = blockIdx.y * c.steps * c.per_tile;
  const std::int64_t last = begin + c.steps * c.per_tile;
  const std::int64_t end = last < c.items ? last : c.items;
  const unsigned own = kLast ? threadIdx.x / c.columns : threadIdx.x;
  for (std::int64_t tile = begin; tile < end; tile += kBatch * c.per_tile) f(tile + own, end);
}

// ---- values per channel

template <typename T, bool kLast>
constexpr int kLanes = kLast ? kWidth<T> : 1;

// f(i, channel) for this thread's lanes.
template <typename T, bool kLast, typename F>
__device__ __forceinline__ void each_lane(const Cut& c, F f) {
  if constexpr (kLast) {
    const std::int64_t first =
        (static_cast<std::int64_t>(blockIdx.x) * c.columns + threadIdx.x % c.columns) * kWidth<T>;
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      const std::int64_t lane = first + i;
      if (lane < c.length) f(i, c.folded ? lane % c.channels : lane);
    }
  } else {
    f(0, static_cast<std::int64_t>(blockIdx.x));
  }
}

template <typename A>
__device__ __forceinline__ A value_at(const void* vector, std::int64_t channel, A otherwise) {
  return vector == nullptr ? otherwise : static_cast<const A*>(vector)[channel];
}

// Means of a few elements spread over the channel, which sums are taken relative to.
template <typename T>
__device__ acc_t<T> pivot_of(const BatchNormAct& p, std::int64_t channel) {
  const std::int64_t count = p.examples * p.pixels, samples = count < kSamples ? count : kSamples;
  const T* x = static_cast<const T*>(p.x);
  acc_t<T> sum = 0;
#pragma unroll
  for (int i = 0; i < kSamples; ++i) {
    if (i < samples) {
      const std::int64_t m = i * count / samples;
      const std::int64_t row = m / p.pixels * p.channels;
      sum += static_cast<acc_t<T>>(x[p.channels_last
                                         ? m * p.channels + channel
                                         : (row + channel) * p.pixels + m % p.pixels]);
    }
  }
  return samples > 0 ? sum / static_cast<acc_t<T>>(samples) : acc_t<T>(0);
}

// ---- sums

// Writes the block's sums of sum[s][i], lane i of this thread, to partial (kSums, chunks, lanes). The
// order of the additions is fixed.
template <typename T, bool kLast, int kSums>
__device__ void store_sums(const Cut& c, acc_t<T> (&sum)[kSums][kLanes<T, kLast>], void* partial) {
  using A = acc_t<T>;
  constexpr int lanes = kLanes<T, kLast>;
  __shared__ A shared[kThreads][lanes];
  const int columns = c.columns, rows = kThreads / columns, row = threadIdx.x / columns;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    __syncthreads();  // the sums before may still be read
#pragma unroll
    for (int i = 0; i < lanes; ++i) shared[threadIdx.x][i] = sum[s][i];
    __syncthreads();
    for (int half = rows / 2; half > 0; half /= 2) {
      if (row < half) {
#pragma unroll
        for (int i = 0; i < lanes; ++i) {
          shared[threadIdx.x][i] += shared[threadIdx.x + half * columns][i];
        }
      }
      __syncthreads();
    }
    if (row == 0) {
      const std::int64_t all = kLast ? c.length : c.channels;
      A* out = static_cast<A*>(partial) + (static_cast<std::int64_t>(s) * c.chunks + blockIdx.y) * all;
      const std::int64_t first =
          kLast ? (static_cast<std::int64_t>(blockIdx.x) * columns + threadIdx.x) * lanes
                : blockIdx.x;
#pragma unroll
      for (int i = 0; i < lanes; ++i) {
        if (first + i < all) out[first + i] = shared[threadIdx.x][i];
      }
    }
  }
}

// Totals of partial (kSums, parts, channels) for channel blockIdx.x * kChannels + threadIdx.x, in the
// first kChannels threads.
template <typename A, int kSums>
__device__ void totals_of(const void* partial, std::int64_t parts, std::int64_t channels,
                          double (&total)[kSums]) {
  __shared__ double shared[kThreads];
  const int own = threadIdx.x % kChannels, part = threadIdx.x / kChannels;
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kChannels + own;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    const A* from = static_cast<const A*>(partial) + s * parts * channels + c;
    double sum = 0;
    if (c < channels) {
#pragma unroll 4
      for (std::int64_t t = part; t < parts; t += kThreads / kChannels) {
        sum += static_cast<double>(from[t * channels]);
      }
    }
    __syncthreads();
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kThreads / kChannels / 2; half > 0; half /= 2) {
      if (part < half) shared[threadIdx.x] += shared[threadIdx.x + half * kChannels];
      __syncthreads();
    }
    total[s] = shared[own];
  }
}

}  // namespace
}  // namespace cuda
}  // namespace fastinterp
