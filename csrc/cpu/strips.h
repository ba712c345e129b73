// How the normalisation kernels walk a tensor: in strips of up to kLanes contiguous elements, many
// rows of them, with everything that belongs to a channel spread out to one value per lane. Both
// layouts then share the same loops:
//     channels_last  the tensor is a matrix (N P, C); lanes are channels
//     NCHW           each plane (n, c) is a matrix (P / kLanes, kLanes); lanes are pixels
#pragma once

#include "arch.h"

namespace fastinterp {
namespace cpu {
namespace {

constexpr std::int64_t kLanes = 64;
constexpr std::int64_t kFlushRows = 64;    // rows summed in A before they are added to a double
constexpr std::int64_t kPartRows = 256;    // rows of a part, at least: parts do not depend on `threads`
constexpr std::int64_t kMaxParts = 64;
constexpr std::int64_t kSerialWork = 1 << 14;  // elements below which threads cost more

struct Strip {
  std::int64_t first;  // element of row 0, lane 0
  std::int64_t row;    // elements from one row to the next
  std::int64_t rows;
  std::int64_t width;  // lanes in use, <= kLanes
  std::int64_t bits;   // byte of the bit mask of row 0; bits_row from one row to the next
  std::int64_t bits_row;
};

struct Geometry {
  std::int64_t examples, channels, pixels;  // N, C, P
  bool channels_last;
  int threads;

  std::int64_t count() const { return examples * pixels; }  // elements of a channel
  bool parallel() const { return threads > 1 && channels * count() >= kSerialWork; }

  // Narrow rows are read several at a time, so that lanes are full: `fold` rows as one.
  std::int64_t fold() const {
    if (!channels_last || channels >= kLanes || kLanes % channels != 0) return 1;
    const std::int64_t rows = kLanes / channels;
    return count() % rows == 0 ? rows : 1;
  }
  std::int64_t lanes() const { return channels * fold(); }  // of a whole row
  std::int64_t rows() const { return count() / fold(); }
  std::int64_t parts() const {
    if (!channels_last) return 1;
    const std::int64_t wanted = rows() / kPartRows;
    return wanted < 1 ? 1 : (wanted > kMaxParts ? kMaxParts : wanted);
  }
  std::int64_t mask_row_bytes() const { return ((channels_last ? lanes() : pixels) + 7) / 8; }

  // f(strip) for the strips of part `part` whose lanes start at lane `c`, or for the planes of
  // channel c.
  template <typename F>
  void walk(std::int64_t c, std::int64_t part, F f) const {
    const std::int64_t bytes = mask_row_bytes();
    if (channels_last) {
      const std::int64_t begin = rows() * part / parts(), end = rows() * (part + 1) / parts();
      const std::int64_t row = lanes(), width = row - c < kLanes ? row - c : kLanes;
      f(Strip{begin * row + c, row, end - begin, width, begin * bytes + c / 8, bytes});
      return;
    }
    const std::int64_t full = pixels / kLanes, rest = pixels % kLanes;
    for (std::int64_t n = 0; n < examples; ++n) {
      const std::int64_t plane = n * channels + c;
      const std::int64_t first = plane * pixels, bits = plane * bytes;
      if (full > 0) f(Strip{first, kLanes, full, kLanes, bits, kLanes / 8});
      if (rest > 0) f(Strip{first + full * kLanes, kLanes, 1, rest, bits + full * kLanes / 8, 0});
    }
  }
};

// Bits of a mask, lane 0 lowest.
inline std::uint64_t load_bits(const std::uint8_t* p, std::int64_t width) {
  std::uint64_t bits = 0;
  if (width == kLanes) {
    std::memcpy(&bits, p, 8);
    return bits;
  }
  for (std::int64_t b = 0; 8 * b < width; ++b) bits |= std::uint64_t{p[b]} << (8 * b);
  return bits;
}
inline void store_bits(std::uint8_t* p, std::int64_t width, std::uint64_t bits) {
  for (std::int64_t b = 0; 8 * b < width; ++b) p[b] = static_cast<std::uint8_t>(bits >> (8 * b));
}

// A tensor, or zeros where there is none: then every row is the same strip of zeros.
template <typename T>
struct Source {
  const T* data;
  bool present;
  const T* row(const Strip& s, std::int64_t r) const {
    return present ? data + s.first + r * s.row : data;
  }
};

// The channel's values, one per lane: value[s][j] for lane j.
template <typename A, int S>
struct Lanes {
  alignas(64) A value[S][kLanes];
  // From values[s * lanes + lane], lanes c and on; a whole plane shares those of channel c.
  Lanes(const Geometry& g, const A* values, std::int64_t c) {
    const std::int64_t lanes = g.lanes();
    for (int s = 0; s < S; ++s) {
      const A* from = values + s * lanes + c;
      if (g.channels_last) {
        const std::int64_t width = lanes - c < kLanes ? lanes - c : kLanes;
        for (std::int64_t j = 0; j < width; ++j) value[s][j] = from[j];
      } else {
        for (std::int64_t j = 0; j < kLanes; ++j) value[s][j] = *from;
      }
    }
  }
};

// A full strip's width as a constant. Not the standard library's, whose inline functions the
// linker would share between the variants.
struct FullWidth {
  constexpr operator std::int64_t() const { return kLanes; }
};

// Calls f(row, width) for every row of a strip; a full width is a constant, for straight-line code.
template <typename F>
inline void each_row(const Strip& strip, std::int64_t begin, std::int64_t end, F f) {
  if (strip.width == kLanes) {
    for (std::int64_t r = begin; r < end; ++r) f(r, FullWidth{});
  } else {
    for (std::int64_t r = begin; r < end; ++r) f(r, strip.width);
  }
}

// out[s * stride + j] += the sum over the strip's rows of terms(r, width, sums), which adds row r to
// sums[s][j].
template <typename A, int S, typename Terms>
inline void sum_rows(const Strip& strip, double* out, std::int64_t stride, Terms terms) {
  alignas(64) A sums[S][kLanes];
  for (std::int64_t begin = 0; begin < strip.rows; begin += kFlushRows) {
    const std::int64_t end = begin + kFlushRows < strip.rows ? begin + kFlushRows : strip.rows;
    for (int s = 0; s < S; ++s) {
      for (std::int64_t j = 0; j < kLanes; ++j) sums[s][j] = 0;
    }
    each_row(strip, begin, end, [&](std::int64_t r, auto width) { terms(r, width, sums); });
    for (int s = 0; s < S; ++s) {
      for (std::int64_t j = 0; j < strip.width; ++j) out[s * stride + j] += sums[s][j];
    }
  }
}

// One normalisation pass: sums over each channel, what follows from them, and a pass over the
// elements that uses it.
//     sum(c, out, stride, walk)   adds to out[s * stride + lane]; not called when S == 0
//     combine(c, total)           total[s] of channel c
//     apply(c, walk)
// `partial` holds partial_size(g, S) doubles. A plane's second pass follows its first while it is
// still in the cache.
inline std::int64_t partial_size(const Geometry& g, std::int64_t sums) {
  return g.channels_last ? g.parts() * sums * g.lanes() : 0;
}

template <int S, typename Sum, typename Combine, typename Apply>
void two_passes(const Geometry& g, double* partial, bool need_sums, bool need_apply, Sum sum,
                Combine combine, Apply apply) {
  if (!g.channels_last) {
#pragma omp parallel for schedule(static) num_threads(g.threads) if (g.parallel())
    for (std::int64_t c = 0; c < g.channels; ++c) {
      double lane_sums[S][kLanes] = {}, total[S] = {};
      const auto walk = [&](auto f) { g.walk(c, 0, f); };
      if (need_sums) sum(c, lane_sums[0], kLanes, walk);
      for (int s = 0; s < S; ++s) {
        for (std::int64_t j = 0; j < kLanes; ++j) total[s] += lane_sums[s][j];
      }
      combine(c, total);
      if (need_apply) apply(c, walk);
    }
    return;
  }
  const std::int64_t parts = g.parts(), lanes = g.lanes();
  if (need_sums) {
#pragma omp parallel for schedule(static) num_threads(g.threads) if (g.parallel())
    for (std::int64_t part = 0; part < parts; ++part) {
      double* out = partial + part * S * lanes;
      for (std::int64_t i = 0; i < S * lanes; ++i) out[i] = 0;
      for (std::int64_t c = 0; c < lanes; c += kLanes) {
        sum(c, out + c, lanes, [&](auto f) { g.walk(c, part, f); });
      }
    }
  }
  for (std::int64_t c = 0; c < g.channels; ++c) {
    double total[S] = {};
    for (std::int64_t part = 0; need_sums && part < parts; ++part) {
      for (int s = 0; s < S; ++s) {
        const double* from = partial + (part * S + s) * lanes;
        for (std::int64_t lane = c; lane < lanes; lane += g.channels) total[s] += from[lane];
      }
    }
    combine(c, total);
  }
  if (!need_apply) return;
#pragma omp parallel for schedule(static) num_threads(g.threads) if (g.parallel())
  for (std::int64_t part = 0; part < parts; ++part) {
    for (std::int64_t c = 0; c < lanes; c += kLanes) {
      apply(c, [&](auto f) { g.walk(c, part, f); });
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace fastinterp
