// How norm_act walks a tensor whose statistics belong to groups of one example's channels. A block,
// one group of an example or some, is read as rows of contiguous elements:
//     NCHW           one group: a row is a plane, with one value of anything per channel and group
//     channels_last  groups that have kSumLanes channels, or all: a row is a pixel's channels, or
//                    several pixels' where channels are few; values differ along it
// A block of one group has one value of whatever belongs to groups. Layer normalisation is the second
// case with one group and one pixel.
#pragma once

#include "elements.h"

namespace fastinterp {
namespace cpu {
namespace {

constexpr std::int64_t kSumLanes = 64;   // a row's terms go to these sums in turn, so that none waits
constexpr std::int64_t kAdds = 64;       // to a lane in A before it is added to a double
constexpr std::int64_t kMaxParts = 64;   // of the examples, each with channel sums of its own
constexpr std::int64_t kPartElements = 1 << 13;    // at least
constexpr std::int64_t kSerialElements = 1 << 14;  // below which threads cost more

struct Block {
  std::int64_t first;             // element
  std::int64_t channel, group;    // the first ones; group counts through the examples
  std::int64_t channels, groups;  // how many
  std::int64_t rows, row, width;  // how many, from one to the next, elements of each
};

// Where a vector lies: in the tensors, in the block's buffer, and among the values and the sums.
struct Place {
  std::int64_t tensor, buffer, channel, group, sum, channel_sum;
};

struct Groups {
  std::int64_t examples, channels, pixels, groups;  // N, C, P, G
  bool channels_last;
  std::int64_t lanes;  // of a vector

  std::int64_t group_channels() const { return channels / groups; }
  std::int64_t group_elements() const { return group_channels() * pixels; }
  std::int64_t block_groups() const {  // the last block may have fewer
    if (!channels_last || groups == 1) return 1;
    const std::int64_t wanted = (kSumLanes + group_channels() - 1) / group_channels();
    return wanted < groups ? wanted : groups;
  }
  std::int64_t blocks() const { return (groups + block_groups() - 1) / block_groups(); }
  bool along_rows() const { return block_groups() > 1; }  // group values differ
  std::int64_t fold() const {                             // pixels to a row
    if (!channels_last || channels >= kSumLanes || kSumLanes % channels != 0) return 1;
    return pixels % (kSumLanes / channels) == 0 ? kSumLanes / channels : 1;
  }
  std::int64_t parts() const {  // does not depend on the number of threads
    const std::int64_t wanted = examples * channels * pixels / kPartElements;
    const std::int64_t most = examples < kMaxParts ? examples : kMaxParts;
    return wanted < 1 ? 1 : (wanted < most ? wanted : most);
  }

  Block block(std::int64_t n, std::int64_t b) const {
    const std::int64_t begin = b * block_groups(), rest = groups - begin;
    Block k{};
    k.groups = rest < block_groups() ? rest : block_groups();
    k.channels = k.groups * group_channels();
    k.channel = begin * group_channels();
    k.group = n * groups + begin;
    k.first = n * channels * pixels + k.channel * (channels_last ? 1 : pixels);
    k.rows = channels_last ? pixels / fold() : k.channels;
    k.row = channels_last ? channels * fold() : pixels;
    k.width = channels_last ? k.channels * fold() : pixels;
    return k;
  }
};

template <typename A>
inline void clear(A* values, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) values[i] = A(0);
}

// The sum of kSumLanes numbers, which are zero from then on.
template <typename A>
inline double take_sum(A* lane) {
  for (std::int64_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (std::int64_t i = 0; i < half; ++i) lane[i] += lane[half + i];
  }
  const double sum = lane[0];
  clear(lane, kSumLanes);
  return sum;
}

// What one thread works with on a block of the channels, one example after the other: values per
// channel and per group, sums of both kinds, and a number per element.
template <typename T, int kChannelValues, int kGroupValues, int kGroupSums, int kChannelSums>
struct GroupWorker {
  using A = acc_t<T>;
  const Groups& g;
  A *buffer, *channel, *group, *sums, *channel_sums;
  double* totals;          // [kGroupSums][block_groups]
  double* channel_totals;  // [kChannelSums][C], or null if they are not wanted
  std::int64_t channel_adds = 0;

  static std::int64_t whole(std::int64_t count) { return (count + 15) / 16 * 16; }
  static std::int64_t row_lanes(const Groups& g) {
    return whole(g.block_groups() * g.group_channels() * g.fold());
  }
  static std::int64_t channel_values(const Groups& g) {
    return g.channels_last ? row_lanes(g) : whole(g.group_channels() * g.lanes);
  }
  static std::int64_t group_values(const Groups& g) {
    return g.along_rows() ? row_lanes(g) : whole(g.lanes);
  }
  static std::int64_t group_lanes(const Groups& g) {
    return g.along_rows() ? row_lanes(g) : kSumLanes;
  }
  static std::int64_t channel_lanes(const Groups& g) {
    return g.channels_last ? row_lanes(g) : kSumLanes;
  }
  static std::int64_t buffer_size(const Groups& g) {
    return whole(g.block_groups() * g.group_elements());
  }
  static std::int64_t bytes(const Groups& g) {
    const std::int64_t numbers = buffer_size(g) + kChannelValues * channel_values(g) +
                                 kGroupValues * group_values(g) + kGroupSums * group_lanes(g) +
                                 kChannelSums * channel_lanes(g);
    return numbers * sizeof(A) + whole(kGroupSums * g.block_groups()) * sizeof(double);
  }

  GroupWorker(const Groups& groups, void* memory, double* channel_totals)
      : g(groups), channel_totals(channel_totals) {
    buffer = static_cast<A*>(memory);
    channel = buffer + buffer_size(g);
    group = channel + kChannelValues * channel_values(g);
    sums = group + kGroupValues * group_values(g);
    channel_sums = sums + kGroupSums * group_lanes(g);
    totals = reinterpret_cast<double*>(channel_sums + kChannelSums * channel_lanes(g));
    clear(sums, kGroupSums * group_lanes(g) + kChannelSums * channel_lanes(g));
  }
  // Before the first and after the last example.
  void begin(const Block& block) const {
    for (int s = 0; channel_totals != nullptr && s < kChannelSums; ++s) {
      clear(channel_totals + s * g.channels + block.channel, block.channels);
    }
  }
  void end(const Block& block) {
    if (channel_adds > 0) take_channel_sums(block, 0);
  }

  // values[c] for the channels of a block: to the lanes of a row, or a vector for each plane.
  void set_channels(const Block& block, int value, const void* values, A otherwise) const {
    const A* from = static_cast<const A*>(values);
    A* to = channel + value * channel_values(g);
    const std::int64_t copies = g.fold(), each = g.channels_last ? 1 : g.lanes;
    for (std::int64_t f = 0; f < copies; ++f) {
      for (std::int64_t c = 0; c < block.channels; ++c) {
        const A v = from == nullptr ? otherwise : from[block.channel + c];
        for (std::int64_t i = 0; i < each; ++i) *to++ = v;
      }
    }
  }
  // A value of group i of the block.
  void set_group(const Block& block, int value, std::int64_t i, double v) const {
    A* to = group + value * group_values(g);
    const A rounded = static_cast<A>(v);
    if (!g.along_rows()) {
      for (std::int64_t j = 0; j < g.lanes; ++j) to[j] = rounded;
      return;
    }
    const std::int64_t width = g.group_channels(), copies = g.fold();
    for (std::int64_t f = 0; f < copies; ++f) {
      for (std::int64_t c = 0; c < width; ++c) to[f * block.channels + i * width + c] = rounded;
    }
  }
  template <typename P>
  typename P::X of_channel(int value, const Place& at) const {
    return P::values(channel + value * channel_values(g) + at.channel);
  }
  template <typename P>
  typename P::X of_group(int value, const Place& at) const {
    return P::values(group + value * group_values(g) + at.group);
  }
  // Of what the last pass added up.
  double mean(int sum, std::int64_t i) const {
    return totals[sum * g.block_groups() + i] / g.group_elements();
  }

  // f(P, place) for the elements of a block; `after(r, lanes' additions)` now and then, for pieces of
  // rows of at most kAdds additions to one of kSumLanes.
  template <typename F, typename After>
  void each(const Block& block, F f, After after) const {
    const std::int64_t all = ~std::int64_t{0}, in_turn = kSumLanes - 1, piece = kSumLanes * kAdds;
    const std::int64_t by_channel = g.channels_last ? all : 0, by_group = g.along_rows() ? all : 0;
    const std::int64_t by_sum = g.along_rows() ? all : in_turn;
    const std::int64_t by_channel_sum = g.channels_last ? all : in_turn;
    for (std::int64_t r = 0; r < block.rows; ++r) {
      const std::int64_t tensor = block.first + r * block.row, own = r * block.width;
      const std::int64_t channel = g.channels_last ? 0 : r * g.lanes;
      const auto place = [&](std::int64_t j) {
        return Place{tensor + j,   own + j,    channel + (j & by_channel),
                     j & by_group, j & by_sum, j & by_channel_sum};
      };
      std::int64_t j = 0;
      while (j < block.width) {
        const std::int64_t begin = j, end = block.width - j < piece ? block.width : j + piece;
        for (; j + Wide<T>::lanes <= end; j += Wide<T>::lanes) f(Wide<T>{}, place(j));
        for (; j < end; ++j) f(Narrow<T>{}, place(j));
        after(r, g.along_rows() ? 1 : (end - begin + kSumLanes - 1) / kSumLanes);
      }
    }
  }

  // Adds up terms(P, place, term): term[0..S) for each group, anew, and the C that follow for each
  // channel, on top of the examples before.
  template <int S, int C, typename Terms>
  void sum(const Block& block, Terms terms) {
    const bool channel_wise = C > 0 && channel_totals != nullptr;
    clear(totals, S * g.block_groups());
    std::int64_t adds = 0;
    each(
        block,
        [&](auto pack, const Place& at) {
          using P = decltype(pack);
          typename P::X term[S + C];
          terms(pack, at, term);
          for (int s = 0; s < S; ++s) add<P>(sums + s * group_lanes(g) + at.sum, term[s]);
          if (channel_wise) {
            for (int s = 0; s < C; ++s) {
              add<P>(channel_sums + s * channel_lanes(g) + at.channel_sum, term[S + s]);
            }
          }
        },
        [&](std::int64_t r, std::int64_t more) {
          if ((adds += more) >= kAdds) {
            take_group_sums(block, S);
            adds = 0;
          }
          if (channel_wise && (!g.channels_last || ++channel_adds >= kAdds)) {
            take_channel_sums(block, r);
          }
        });
    if (adds > 0) take_group_sums(block, S);
  }
  template <typename P>
  static void add(A* to, typename P::X term) {
    P::put(to, P::values(to) + term);
  }

  void take_group_sums(const Block& block, int count) {
    for (int s = 0; s < count; ++s) {
      A* lane = sums + s * group_lanes(g);
      double* total = totals + s * g.block_groups();
      if (!g.along_rows()) {
        *total += take_sum(lane);
        continue;
      }
      for (std::int64_t i = 0, lanes = block.width / g.group_channels(); i < lanes; ++i) {
        double sum = 0;
        for (std::int64_t c = 0; c < g.group_channels(); ++c) sum += lane[i * g.group_channels() + c];
        total[i % block.groups] += sum;
      }
      clear(lane, block.width);
    }
  }
  // Of channel r of the block where it has a plane, else of all of them.
  void take_channel_sums(const Block& block, std::int64_t r) {
    for (int s = 0; s < kChannelSums; ++s) {
      A* lane = channel_sums + s * channel_lanes(g);
      double* total = channel_totals + s * g.channels + block.channel;
      if (!g.channels_last) {
        total[r] += take_sum(lane);
        continue;
      }
      for (std::int64_t f = 0; f < block.width; f += block.channels) {
        for (std::int64_t c = 0; c < block.channels; ++c) total[c] += lane[f + c];
      }
      clear(lane, block.width);
    }
    channel_adds = 0;
  }
};

}  // namespace
}  // namespace cpu
}  // namespace fastinterp
