// The weight gradient of a bfloat16 convolution on AMX tiles, channels_last.
//
//     gw[o, (i, j), c] = sum over output pixels p of gy[p, o] x[window (i, j) of p, c]
//
// is one product of K = pixels for each tap (i, j) of the kernel. Output pixels are laid out on a grid
// with room for zeros between rows and between examples, and x on the same grid, one grid for each
// phase of the stride. A tap is then nothing but a shift: gy[k] meets x[k + shift], and what lies
// outside the image meets a zero. Tiles want pairs of pixels side by side, so x is packed once for
// even and once for odd shifts, gy once and transposed; all taps share them. The grid is done in
// parts whose packed form fits the second-level cache, and every sum is made in the order of the
// parts by one thread, so that results do not depend on the number of threads.
#include <immintrin.h>

#include "../kernels.h"

namespace fastinterp {
namespace cpu {
namespace {

using std::int64_t;

constexpr int64_t kTile = 16;         // rows of a tile, and its columns in float or bfloat16 pairs
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kStep = 32;         // pixels of one tile product
constexpr int64_t kChunk = 8;         // steps packed by one thread at a time
constexpr int64_t kPartBytes = 1 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Tap t of output o reads x[stride (o + shift(t)) + phase(t)].
struct Axis {
  int64_t in, out, kernel, stride, padding, dilation;

  int64_t reach(int64_t tap) const { return tap * dilation - padding; }
  int64_t phase(int64_t tap) const { return (reach(tap) % stride + stride) % stride; }
  int64_t shift(int64_t tap) const { return (reach(tap) - phase(tap)) / stride; }
  int64_t behind() const { return larger(0, -shift(0)); }
  int64_t ahead() const { return larger(0, shift(kernel - 1)); }
  // Elements of x of a phase that some output reads.
  int64_t used(int64_t phase) const {
    return phase < in ? smaller(ceil_div(in - phase, stride), out + ahead()) : 0;
  }
  // Places on the grid: no shift leads from one row, or example, to the values of the next.
  int64_t pitch() const { return larger(out + ahead(), used(0) + behind()); }
};

struct Plan {
  const Conv2dWeightGrad& p;
  Axis row, column;
  int64_t rows, columns;          // grid rows of an example; places of a row, even
  int64_t o_tiles, c_tiles, taps;
  int64_t part_rows, steps;       // grid rows of a part, products along its pixels
  int64_t lead, pairs;            // places of x before the part's first, pairs in all
  int64_t versions;               // (row phase, column phase, parity of the shift), used or not

  explicit Plan(const Conv2dWeightGrad& given) : p(given) {
    row = {p.x_size[0], p.y_size[0], p.kernel[0], p.stride[0], p.padding[0], p.dilation[0]};
    column = {p.x_size[1], p.y_size[1], p.kernel[1], p.stride[1], p.padding[1], p.dilation[1]};
    rows = row.pitch();
    columns = (column.pitch() + 1) / 2 * 2;
    o_tiles = ceil_div(p.out_channels, kTile);
    c_tiles = ceil_div(p.channels, kTile);
    taps = row.kernel * column.kernel;
    versions = 2 * row.stride * column.stride;
    int64_t packings = 0;
    for (int64_t v = 0; v < versions; ++v) packings += used(v);
    const int64_t row_bytes = 2 * columns * kTile * (o_tiles + packings * c_tiles);
    const int64_t parts = ceil_div(total_rows() * row_bytes, kPartBytes);
    part_rows = ceil_div(total_rows(), larger(parts, 1));
    steps = ceil_div(part_rows * columns, kStep);
    lead = (row.behind() * columns + column.behind() + 1) / 2 * 2;
    pairs = (lead + row.ahead() * columns + column.ahead() + steps * kStep) / 2 + 2;
  }
  int64_t total_rows() const { return p.examples * rows; }

  int64_t version(int64_t i, int64_t j) const {
    const int64_t odd = column.shift(j) & 1;  // columns is even
    return (row.phase(i) * column.stride + column.phase(j)) * 2 + odd;
  }
  bool used(int64_t wanted) const {
    for (int64_t i = 0; i < row.kernel; ++i) {
      for (int64_t j = 0; j < column.kernel; ++j) {
        if (version(i, j) == wanted) return true;
      }
    }
    return false;
  }
  int64_t x_places() const { return 2 * pairs + 2; }
  int64_t tables() const { return 1 + row.stride * column.stride; }
};

struct Buffers {
  const std::uint16_t** places;  // of gy, then of each phase of x: where a place's channels are
  std::uint16_t* zeros;
  char *gy, *x;                  // packed
  float* sums;                   // (taps, o_tiles, c_tiles) tiles
  int64_t bytes;

  Buffers(const Plan& plan, char* base) {
    char* at = base;
    const auto take = [&at](int64_t size) {
      char* taken = at;
      at += ceil_div(size, 64) * 64;
      return taken;
    };
    const int64_t widest = larger(plan.o_tiles, plan.c_tiles) * kTile;
    places = reinterpret_cast<const std::uint16_t**>(
        take(plan.tables() * table_size(plan) * sizeof(void*)));
    zeros = reinterpret_cast<std::uint16_t*>(take(2 * widest));
    gy = take(plan.o_tiles * plan.steps * kTileBytes);
    x = take(plan.versions * plan.c_tiles * plan.pairs * 64);
    sums = reinterpret_cast<float*>(take(plan.taps * plan.o_tiles * plan.c_tiles * kTileBytes));
    bytes = at - base;
  }
  static int64_t table_size(const Plan& plan) {
    return larger(plan.x_places(), plan.steps * kStep);
  }
};

// places[k] of grid place first + k, for k in [0, count): row r of the grid has its `used` first
// places at row_of(r), which is null for a row of zeros, `step` elements apart.
template <typename RowOf>
void find(const Plan& plan, const Buffers& b, const std::uint16_t** places, int64_t first,
          int64_t count, int64_t used, int64_t step, RowOf row_of) {
  int64_t k = 0;
  for (; k < count && first + k < 0; ++k) places[k] = b.zeros;
  int64_t row = (first + k) / plan.columns, column = (first + k) % plan.columns;
  for (; k < count; ++row, column = 0) {
    const std::uint16_t* values = row_of(row);
    const int64_t stop = smaller(k + plan.columns - column, count);
    const int64_t there = values ? smaller(k + larger(used - column, 0), stop) : k;
    if (values) values += column * step;
    for (; k < there; ++k, values += step) places[k] = values;
    for (; k < stop; ++k) places[k] = b.zeros;
  }
}

void find_gy(const Plan& plan, const Buffers& b, int64_t first_row, int64_t end_row) {
  const auto* gy = static_cast<const std::uint16_t*>(plan.p.gy);
  const int64_t width = plan.column.out, step = plan.p.out_channels;
  const auto row_of = [&](int64_t row) -> const std::uint16_t* {
    const int64_t example = row / plan.rows, y = row % plan.rows;
    if (row >= end_row || y >= plan.row.out) return nullptr;
    return gy + (example * plan.row.out + y) * width * step;
  };
  find(plan, b, b.places, first_row * plan.columns, plan.steps * kStep, width, step, row_of);
}

void find_x(const Plan& plan, const Buffers& b, int64_t first_row, int64_t phase) {
  const auto* x = static_cast<const std::uint16_t*>(plan.p.x);
  const int64_t down = phase / plan.column.stride, right = phase % plan.column.stride;
  const int64_t rows = plan.row.used(down), channels = plan.p.channels;
  const auto row_of = [&](int64_t row) -> const std::uint16_t* {
    const int64_t example = row / plan.rows, y = row % plan.rows;
    if (example >= plan.p.examples || y >= rows) return nullptr;
    const int64_t line = example * plan.row.in + y * plan.row.stride + down;
    return x + (line * plan.column.in + right) * channels;
  };
  // Entry 0 is the place before the lead, with which the first odd pair begins.
  find(plan, b, b.places + (1 + phase) * Buffers::table_size(plan),
       first_row * plan.columns - plan.lead - 1, plan.x_places(), plan.column.used(right),
       plan.column.stride * channels, row_of);
}

// 16 channels of two places, as pairs.
inline __m512i pair(const std::uint16_t* a, const std::uint16_t* b, __mmask16 valid) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, a));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, b));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

inline __mmask16 valid_lanes(int64_t channels, int64_t tile) {
  const int64_t left = channels - tile * kTile;
  return static_cast<__mmask16>(left >= kTile ? 0xffff : (1 << left) - 1);
}

inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// The packing of kChunk steps of gy, or as many pairs of x, all channels.
void pack_gy(const Plan& plan, const Buffers& b, int64_t chunk) {
  const int64_t end = smaller((chunk + 1) * kChunk, plan.steps);
  for (int64_t step = chunk * kChunk; step < end; ++step) {
    const std::uint16_t** at = b.places + step * kStep;
    for (int64_t tile = 0; tile < plan.o_tiles; ++tile) {
      const __mmask16 valid = valid_lanes(plan.p.out_channels, tile);
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        r[i] = pair(at[2 * i] + tile * kTile, at[2 * i + 1] + tile * kTile, valid);
      }
      transpose(r);
      char* out = b.gy + (tile * plan.steps + step) * kTileBytes;
      for (int i = 0; i < 16; ++i) _mm512_store_si512(out + i * 64, r[i]);
    }
  }
}

char* packed_x(const Plan& plan, const Buffers& b, int64_t version, int64_t tile) {
  return b.x + (version * plan.c_tiles + tile) * plan.pairs * 64;
}

void pack_x(const Plan& plan, const Buffers& b, int64_t version, int64_t chunk) {
  if (!plan.used(version)) return;
  const std::uint16_t** places =
      b.places + (1 + version / 2) * Buffers::table_size(plan) + 1 - version % 2;
  const int64_t end = smaller((chunk + 1) * kChunk * kTile, plan.pairs);
  for (int64_t t = chunk * kChunk * kTile; t < end; ++t) {
    const std::uint16_t *first = places[2 * t], *second = places[2 * t + 1];
    char* out = packed_x(plan, b, version, 0) + t * 64;
    for (int64_t tile = 0; tile < plan.c_tiles; ++tile, out += plan.pairs * 64) {
      const __mmask16 valid = valid_lanes(plan.p.channels, tile);
      _mm512_store_si512(out, pair(first + tile * kTile, second + tile * kTile, valid));
    }
  }
}

// Up to 2 x 2 tiles of sums: tiles 0 to 3; 4, 5 are of gy and 6, 7 of x.
template <int O, int C>
void multiply(const char* gy, int64_t gy_tile, const char* x, int64_t x_tile, int64_t steps,
              float* sums, int64_t sums_row, bool first) {
  constexpr int area = kTile * kTile;
  if (first) {
    _tile_zero(0);
    if (C > 1) _tile_zero(1);
    if (O > 1) _tile_zero(2);
    if (O > 1 && C > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    if (C > 1) _tile_loadd(1, sums + area, 64);
    if (O > 1) _tile_loadd(2, sums + sums_row, 64);
    if (O > 1 && C > 1) _tile_loadd(3, sums + sums_row + area, 64);
  }
  for (int64_t s = 0; s < steps; ++s, gy += kTileBytes, x += kTileBytes) {
    _tile_loadd(4, gy, 64);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (O > 1) {
      _tile_loadd(5, gy + gy_tile, 64);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (C > 1) {
      _tile_loadd(7, x + x_tile, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (O > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  if (C > 1) _tile_stored(1, sums + area, 64);
  if (O > 1) _tile_stored(2, sums + sums_row, 64);
  if (O > 1 && C > 1) _tile_stored(3, sums + sums_row + area, 64);
}

void multiply_block(const Plan& plan, const Buffers& b, int64_t o, int64_t c, int64_t tap,
                    bool first) {
  const int64_t i = tap / plan.column.kernel, j = tap % plan.column.kernel;
  const int64_t version = plan.version(i, j);
  const int64_t shift = plan.row.shift(i) * plan.columns + plan.column.shift(j);
  const int64_t pair = (plan.lead + shift + version % 2) / 2;
  const char *gy = b.gy + o * plan.steps * kTileBytes, *x = packed_x(plan, b, version, c) + pair * 64;
  const int64_t gy_tile = plan.steps * kTileBytes, x_tile = plan.pairs * 64;
  const int64_t sums_row = plan.c_tiles * kTile * kTile;
  float* sums = b.sums + ((tap * plan.o_tiles + o) * plan.c_tiles + c) * kTile * kTile;
  const bool two_o = o + 1 < plan.o_tiles, two_c = c + 1 < plan.c_tiles;
  const auto product = two_o ? (two_c ? multiply<2, 2> : multiply<2, 1>)
                             : (two_c ? multiply<1, 2> : multiply<1, 1>);
  product(gy, gy_tile, x, x_tile, plan.steps, sums, sums_row, first);
}

// bfloat16 of 16 floats, rounded to nearest even; a NaN stays a NaN.
inline __m256i rounded(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_set1_epi32(up, nan, 0x7fc00000), 16));
}

void write_out(const Plan& plan, const Buffers& b, int64_t o) {
  auto* out = static_cast<std::uint16_t*>(plan.p.gweight) + o * plan.taps * plan.p.channels;
  for (int64_t tap = 0; tap < plan.taps; ++tap, out += plan.p.channels) {
    const float* tile = b.sums + (tap * plan.o_tiles + o / kTile) * plan.c_tiles * kTile * kTile;
    for (int64_t c = 0; c < plan.c_tiles; ++c, tile += kTile * kTile) {
      _mm256_mask_storeu_epi16(out + c * kTile, valid_lanes(plan.p.channels, c),
                               rounded(_mm512_load_ps(tile + o % kTile * kTile)));
    }
  }
}

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace

int64_t conv2d_weight_grad_scratch_bytes(const Conv2dWeightGrad& p) {
  return Buffers(Plan(p), nullptr).bytes;
}

void conv2d_weight_grad(const Conv2dWeightGrad& p) {
  const Plan plan(p);
  const Buffers b(plan, static_cast<char*>(p.scratch));
  const int64_t widest = larger(plan.o_tiles, plan.c_tiles) * kTile;
  for (int64_t c = 0; c < widest; ++c) b.zeros[c] = 0;
  const int64_t phases = plan.tables() - 1;
  const int64_t chunks = ceil_div(larger(plan.steps, ceil_div(plan.pairs, kTile)), kChunk);
  const int64_t o_blocks = ceil_div(plan.o_tiles, 2), c_blocks = ceil_div(plan.c_tiles, 2);
  const TileConfig config;
#pragma omp parallel num_threads(p.threads)
  {
    _tile_loadconfig(&config);
    for (int64_t begin = 0; begin < plan.total_rows(); begin += plan.part_rows) {
      const int64_t end = smaller(begin + plan.part_rows, plan.total_rows());
#pragma omp for schedule(static)
      for (int64_t t = 0; t <= phases; ++t) {
        if (t == 0) {
          find_gy(plan, b, begin, end);
        } else {
          find_x(plan, b, begin, t - 1);
        }
      }
#pragma omp for schedule(static)
      for (int64_t t = 0; t < (1 + plan.versions) * chunks; ++t) {
        if (t < chunks) {
          pack_gy(plan, b, t);
        } else {
          pack_x(plan, b, t / chunks - 1, t % chunks);
        }
      }
#pragma omp for schedule(static)
      for (int64_t t = 0; t < c_blocks * o_blocks * plan.taps; ++t) {
        const int64_t block = t / plan.taps;
        multiply_block(plan, b, block % o_blocks * 2, block / o_blocks * 2, t % plan.taps,
                       begin == 0);
      }
    }
    _tile_release();
#pragma omp for schedule(static)
    for (int64_t o = 0; o < p.out_channels; ++o) write_out(plan, b, o);
  }
}

}  // namespace cpu
}  // namespace fastinterp
