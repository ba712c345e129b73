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

inline std::int64_t whole_lines(std::int64_t count) { return (count + 15) / 16 * 16; }

struct Groups {
  std::int64_t examples, channels, pixels, groups;  // N, C, P, G
  bool channels_last;
  std::int64_t lanes;  // of a vector

  std::int64_t group_channels = channels / groups, group_elements = group_channels * pixels;
  double share = 1.0 / group_elements;
  std::int64_t block_groups = groups_to_a_block(), fold = pixels_to_a_row();
  std::int64_t blocks = (groups + block_groups - 1) / block_groups;  // the last may have fewer groups
  bool along_rows = block_groups > 1;                                // group values differ
  std::int64_t parts = parts_of_examples();

  // How many numbers a thread keeps of each kind.
  std::int64_t block_elements = whole_lines(block_groups * group_elements);
  std::int64_t row_lanes = whole_lines(block_groups * group_channels * fold);
  std::int64_t channel_values = channels_last ? row_lanes : whole_lines(group_channels * lanes);
  std::int64_t group_values = along_rows ? row_lanes : whole_lines(lanes);
  std::int64_t group_sums = along_rows ? row_lanes : kSumLanes;
  std::int64_t channel_sums = channels_last ? row_lanes : kSumLanes;

  Groups(const NormAct& p, std::int64_t vector_lanes)
      : examples(p.examples),
        channels(p.channels),
        pixels(p.pixels),
        groups(p.groups),
        channels_last(p.channels_last),
        lanes(vector_lanes) {}

  std::int64_t groups_to_a_block() const {
    if (!channels_last || groups == 1) return 1;
    const std::int64_t wanted = (kSumLanes + group_channels - 1) / group_channels;
    return wanted < groups ? wanted : groups;
  }
  std::int64_t pixels_to_a_row() const {
    if (!channels_last || channels >= kSumLanes || kSumLanes % channels != 0) return 1;
    return pixels % (kSumLanes / channels) == 0 ? kSumLanes / channels : 1;
  }
  std::int64_t parts_of_examples() const {  // not by the number of threads
    const std::int64_t wanted = examples * channels * pixels / kPartElements;
    const std::int64_t most = examples < kMaxParts ? examples : kMaxParts;
    return wanted < 1 ? 1 : (wanted < most ? wanted : most);
  }

  Block block(std::int64_t n, std::int64_t b) const {
    const std::int64_t begin = b * block_groups, rest = groups - begin;
    Block k{};
    k.groups = rest < block_groups ? rest : block_groups;
    k.channels = k.groups * group_channels;
    k.channel = begin * group_channels;
    k.group = n * groups + begin;
    k.first = n * channels * pixels + k.channel * (channels_last ? 1 : pixels);
    k.rows = channels_last ? pixels / fold : k.channels;
    k.row = channels_last ? channels * fold : pixels;
    k.width = channels_last ? k.channels * fold : pixels;
    return k;
  }
  // The same as one row where it is contiguous and has one value of everything that is asked for.
  Block without_channels(Block k) const {
    if (along_rows || k.row != k.width) return k;
    k.row = k.width = k.rows * k.width;
    k.rows = 1;
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
  constexpr int lanes = Vector<A>::lanes;
  typename Vector<A>::type sum{};
#pragma GCC unroll 16
  for (int i = 0; i < kSumLanes; i += lanes) {
    sum += load_vector(lane + i);
    store_vector(lane + i, typename Vector<A>::type{});
  }
#pragma GCC unroll 4
  for (int half = lanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) sum[i] += sum[half + i];
  }
  return sum[0];
}

// Values of which there is one per channel or per group, and a buffer with a number per element. A
// copy on the stack of a pass keeps these pointers in registers.
template <typename A>
struct Values {
  A *channel, *group, *buffer;
  std::int64_t channel_values, group_values;  // from one value to the next

  template <typename P>
  typename P::X of_channel(int value, const Place& at) const {
    return P::values(channel + value * channel_values + at.channel);
  }
  template <typename P>
  typename P::X of_group(int value, const Place& at) const {
    return P::values(group + value * group_values + at.group);
  }
};

// What one thread works with on a block of the channels, one example after the other: so many values
// per channel and per group, and sums of both kinds.
template <typename T, int kChannelValues, int kGroupValues, int kGroupSums, int kChannelSums>
struct GroupWorker {
  using A = acc_t<T>;
  const Groups& g;
  const Values<A> values;
  A *const sums, *const channel_sums;
  double* const totals;          // [kGroupSums][block_groups]
  double* const channel_totals;  // [kChannelSums][C], or null if they are not wanted
  std::int64_t channel_adds = 0;

  static std::int64_t numbers(const Groups& g) {
    return g.block_elements + kChannelValues * g.channel_values + kGroupValues * g.group_values +
           kGroupSums * g.group_sums + kChannelSums * g.channel_sums;
  }
  static std::int64_t bytes(const Groups& g) {
    return numbers(g) * sizeof(A) + whole_lines(kGroupSums * g.block_groups) * sizeof(double);
  }

  GroupWorker(const Groups& groups, A* memory, double* channel_totals)
      : g(groups),
        values{memory + g.block_elements,
               memory + g.block_elements + kChannelValues * g.channel_values, memory,
               g.channel_values, g.group_values},
        sums(values.group + kGroupValues * g.group_values),
        channel_sums(sums + kGroupSums * g.group_sums),
        totals(reinterpret_cast<double*>(memory + numbers(g))),
        channel_totals(channel_totals) {
    clear(sums, kGroupSums * g.group_sums + kChannelSums * g.channel_sums);
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

  // from[c] for the channels of a block: to the lanes of a row, or a vector for each plane.
  void set_channels(const Block& block, int value, const void* data, A otherwise) const {
    const A* from = static_cast<const A*>(data);
    A* to = values.channel + value * g.channel_values;
    for (std::int64_t f = 0; f < g.fold; ++f) {
      for (std::int64_t c = 0; c < block.channels; ++c) {
        const A v = from == nullptr ? otherwise : from[block.channel + c];
        for (std::int64_t i = 0; i < (g.channels_last ? 1 : g.lanes); ++i) *to++ = v;
      }
    }
  }
  // A value of group i of the block.
  void set_group(const Block& block, int value, std::int64_t i, A v) const {
    A* to = values.group + value * g.group_values;
    if (!g.along_rows) {
      store_vector(to, typename Vector<A>::type{} + v);
      return;
    }
    for (std::int64_t f = 0; f < g.fold; ++f) {
      A* lane = to + f * block.channels + i * g.group_channels;
      for (std::int64_t c = 0; c < g.group_channels; ++c) lane[c] = v;
    }
  }
  // Of what the last pass added up.
  double mean(int sum, std::int64_t i) const {
    return totals[sum * g.block_groups + i] * g.share;
  }

  // f(P, place) for the elements of a block; after(r, additions to a lane of sums) behind pieces of
  // rows of at most kAdds of them.
  template <typename F, typename After>
  void each(const Block& block, F f, After after) const {
    const std::int64_t all = ~std::int64_t{0}, in_turn = kSumLanes - 1, piece = kSumLanes * kAdds;
    const bool last = g.channels_last, along_rows = g.along_rows;
    const std::int64_t by_channel = last ? all : 0, by_channel_sum = last ? all : in_turn;
    const std::int64_t by_group = along_rows ? all : 0, by_sum = along_rows ? all : in_turn;
    const std::int64_t width = block.width, plane = last ? 0 : g.lanes;
    for (std::int64_t r = 0; r < block.rows; ++r) {
      const std::int64_t tensor = block.first + r * block.row, own = r * width;
      const auto place = [&](std::int64_t j) {
        return Place{tensor + j,   own + j,    r * plane + (j & by_channel),
                     j & by_group, j & by_sum, j & by_channel_sum};
      };
      for (std::int64_t j = 0; j < width;) {
        const std::int64_t begin = j, end = width - j < piece ? width : j + piece;
        for (; j + Wide<T>::lanes <= end; j += Wide<T>::lanes) f(Wide<T>{}, place(j));
        for (; j < end; ++j) f(Narrow<T>{}, place(j));
        after(r, along_rows ? 1 : (end - begin + kSumLanes - 1) / kSumLanes);
      }
    }
  }

  // Adds up terms(P, place, term): term[0..S) for each group, anew, and the C that follow for each
  // channel, on top of the examples before.
  template <int S, int C, typename Terms>
  void sum(const Block& block, Terms terms) {
    const bool channel_wise = C > 0 && channel_totals != nullptr;
    A *const sums = this->sums, *const channel_sums = this->channel_sums;
    const std::int64_t group_sums = g.group_sums, channel_lanes = g.channel_sums;
    clear(totals, S * g.block_groups);
    std::int64_t adds = 0;
    each(
        block,
        [&](auto pack, const Place& at) {
          using P = decltype(pack);
          typename P::X term[S + C];
          terms(pack, at, term);
#pragma GCC unroll 8
          for (int s = 0; s < S; ++s) add<P>(sums + s * group_sums + at.sum, term[s]);
          if (!channel_wise) return;
#pragma GCC unroll 8
          for (int s = 0; s < C; ++s) {
            add<P>(channel_sums + s * channel_lanes + at.channel_sum, term[S + s]);
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

  FI_NOINLINE void take_group_sums(const Block& block, int count) {
    for (int s = 0; s < count; ++s) {
      A* lane = sums + s * g.group_sums;
      double* total = totals + s * g.block_groups;
      if (!g.along_rows) {
        *total += take_sum(lane);
        continue;
      }
      for (std::int64_t f = 0; f < g.fold; ++f) {
        for (std::int64_t i = 0; i < block.groups; ++i) {
          double sum = 0;
          for (std::int64_t c = 0; c < g.group_channels; ++c) sum += *lane++;
          total[i] += sum;
        }
      }
      clear(sums + s * g.group_sums, block.width);
    }
  }
  // Of channel r of the block where it has a plane, else of all of them.
  FI_NOINLINE void take_channel_sums(const Block& block, std::int64_t r) {
    for (int s = 0; s < kChannelSums; ++s) {
      A* lane = channel_sums + s * g.channel_sums;
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
