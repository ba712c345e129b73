// How the normalisation kernels walk a tensor: in strips of up to kLanes contiguous elements, many
// rows of them, with everything that belongs to a channel spread out to one value per lane. Both
// layouts then share the same loops:
//     channels_last  the tensor is a matrix (N P, C); lanes are channels
//     NCHW           each plane (n, c) is a matrix (P / kLanes, kLanes); lanes are pixels
#pragma once

#include "elements.h"

namespace fastinterp {
namespace cpu {
namespace {

constexpr std::int64_t kLanes = 64;
constexpr std::int64_t kBlockRows = 64;    // rows summed in A before they are added to a double
constexpr std::int64_t kPartBlocks = 4;    // at least
constexpr std::int64_t kMaxParts = 64;
constexpr std::int64_t kSmallPlane = 512;  // pixels up to which a strip runs across the examples
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
    if (!channels_last || channels == 0 || channels >= kLanes || kLanes % channels != 0) return 1;
    const std::int64_t rows = kLanes / channels;
    return count() % rows == 0 ? rows : 1;
  }
  std::int64_t lanes() const { return channels * fold(); }  // of a whole row
  std::int64_t rows() const { return count() / fold(); }
  std::int64_t blocks() const { return (rows() + kBlockRows - 1) / kBlockRows; }
  // Of the blocks, each with sums of its own; their number does not depend on `threads`.
  std::int64_t parts() const {
    const std::int64_t wanted = blocks() / kPartBlocks;
    return wanted < 1 ? 1 : (wanted > kMaxParts ? kMaxParts : wanted);
  }
  std::int64_t mask_row_bytes() const { return ((channels_last ? lanes() : pixels) + 7) / 8; }

  // A channel (NCHW), or a block of rows (channels_last), is this many strips.
  std::int64_t strips() const {
    if (channels_last) return 1;
    if (small_planes()) return (pixels + kLanes - 1) / kLanes;
    return examples * (pixels % kLanes == 0 ? 1 : 2);
  }
  bool small_planes() const { return pixels <= kSmallPlane; }

  // Strip i of channel c, or of the lanes from c on in the block of rows that begins at `begin`.
  Strip strip(std::int64_t c, std::int64_t begin, std::int64_t i) const {
    const std::int64_t bytes = mask_row_bytes();
    if (channels_last) {
      const std::int64_t row = lanes(), width = row - c < kLanes ? row - c : kLanes;
      const std::int64_t count = rows() - begin < kBlockRows ? rows() - begin : kBlockRows;
      return {begin * row + c, row, count, width, begin * bytes + c / 8, bytes};
    }
    if (small_planes()) {  // kLanes pixels of every example
      const std::int64_t first = i * kLanes, rest = pixels - first;
      return {c * pixels + first, channels * pixels, examples, rest < kLanes ? rest : kLanes,
              c * bytes + first / 8, channels * bytes};
    }
    // A plane's whole rows of lanes, then what is left of it.
    const std::int64_t each = pixels % kLanes == 0 ? 1 : 2, plane = i / each * channels + c;
    const std::int64_t full = pixels / kLanes, first = plane * pixels, bits = plane * bytes;
    if (i % each == 0) return {first, kLanes, full, kLanes, bits, kLanes / 8};
    return {first + full * kLanes, kLanes, 1, pixels % kLanes, bits + full * kLanes / 8, 0};
  }
};

template <typename T>
struct Rows {
  const T* first;
  std::int64_t row;
  const T* at(std::int64_t r, std::int64_t j) const { return first + r * row + j; }
};

// A tensor, or zeros where there is none: then every row is the same strip of zeros.
template <typename T>
struct Source {
  const T* data;
  bool present;
  // The same tensor seen from a strip's first element.
  Rows<T> in(const Strip& s) const {
    return present ? Rows<T>{data + s.first, s.row} : Rows<T>{data, 0};
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

// f(P, j) for the lanes of a strip: whole vectors, then what is left of them.
template <typename T, typename F>
inline void each_lane(const Strip& strip, F f) {
  std::int64_t j = 0;
  for (; j + Wide<T>::lanes <= strip.width; j += Wide<T>::lanes) f(Wide<T>{}, j);
  for (; j < strip.width; ++j) f(Narrow<T>{}, j);
}

// Q neighbouring vectors at a time, which keeps their sums in registers and reads whole cache lines.
template <typename P, int S, int Q, typename Terms>
inline void sum_block(std::int64_t begin, std::int64_t end, std::int64_t j, double* out,
                      std::int64_t stride, const Terms& terms) {
  typename P::X sum[Q][S] = {};
  for (std::int64_t r = begin; r < end; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) terms(P{}, r, j + q * P::lanes, sum[q]);
  }
  for (int q = 0; q < Q; ++q) {
    for (int s = 0; s < S; ++s) {
      typename P::A lane[P::lanes];
      P::put(lane, sum[q][s]);
      for (int i = 0; i < P::lanes; ++i) out[s * stride + j + q * P::lanes + i] += lane[i];
    }
  }
}

// out[s * stride + j] += the sum over the strip's rows of what terms(P, r, j, sum) adds to sum[s].
template <typename T, int S, typename Terms>
inline void sum_rows(const Strip& strip, double* out, std::int64_t stride, const Terms& terms) {
  constexpr int together = S <= 4 ? 4 : 1, lanes = Wide<T>::lanes;
  for (std::int64_t begin = 0; begin < strip.rows; begin += kBlockRows) {
    const std::int64_t end = begin + kBlockRows < strip.rows ? begin + kBlockRows : strip.rows;
    std::int64_t j = 0;
    for (; j + together * lanes <= strip.width; j += together * lanes) {
      sum_block<Wide<T>, S, together>(begin, end, j, out, stride, terms);
    }
    if (together > 1) {
      for (; j + lanes <= strip.width; j += lanes) {
        sum_block<Wide<T>, S, 1>(begin, end, j, out, stride, terms);
      }
    }
    for (; j < strip.width; ++j) sum_block<Narrow<T>, S, 1>(begin, end, j, out, stride, terms);
  }
}

// One normalisation pass: sums over each channel, what follows from them, and a pass over the
// elements that uses it.
//     sum(strips, out, stride)    adds to out[s * stride + lane]
//     combine(c, total)           total[s] of channel c
//     apply(strips)
// A plane's second pass follows its first while it is still in the cache. `partial` holds
// partial_size(g, S) doubles.
inline std::int64_t partial_size(const Geometry& g, std::int64_t sums) {
  return g.channels_last ? g.parts() * sums * g.lanes() : 0;
}

// The strips of channel c, or of the lanes from c on in the block of rows from `begin` on.
struct Strips {
  const Geometry& g;
  std::int64_t c, begin;
  template <typename F>
  void each(F f) const {
    for (std::int64_t i = 0; i < g.strips(); ++i) f(g.strip(c, begin, i));
  }
};

// f(first row) for the blocks of a part
template <typename F>
inline void each_block(const Geometry& g, std::int64_t part, F f) {
  const std::int64_t begin = g.blocks() * part / g.parts(), end = g.blocks() * (part + 1) / g.parts();
  for (std::int64_t block = begin; block < end; ++block) f(block * kBlockRows);
}

template <int S, typename Sum, typename Combine, typename Apply>
void two_passes(const Geometry& g, double* partial, bool need_sums, bool need_apply, Sum sum,
                Combine combine, Apply apply) {
  if (!g.channels_last) {
#pragma omp parallel for schedule(static) num_threads(g.threads) if (g.parallel())
    for (std::int64_t c = 0; c < g.channels; ++c) {
      double lane_sums[S][kLanes] = {}, total[S] = {};
      if (need_sums) sum(Strips{g, c, 0}, lane_sums[0], kLanes);
      for (int s = 0; s < S; ++s) {
        for (std::int64_t j = 0; j < kLanes; ++j) total[s] += lane_sums[s][j];
      }
      combine(c, total);
      if (need_apply) apply(Strips{g, c, 0});
    }
    return;
  }
  const std::int64_t parts = g.parts(), lanes = g.lanes();
  if (need_sums) {
#pragma omp parallel for schedule(static) num_threads(g.threads) if (g.parallel())
    for (std::int64_t part = 0; part < parts; ++part) {
      double* out = partial + part * S * lanes;
      for (std::int64_t i = 0; i < S * lanes; ++i) out[i] = 0;
      each_block(g, part, [&](std::int64_t begin) {
        for (std::int64_t c = 0; c < lanes; c += kLanes) sum(Strips{g, c, begin}, out + c, lanes);
      });
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
    each_block(g, part, [&](std::int64_t begin) {
      for (std::int64_t c = 0; c < lanes; c += kLanes) apply(Strips{g, c, begin});
    });
  }
}

}  // namespace
}  // namespace cpu
}  // namespace fastinterp
