#include "vector.h"

namespace fastinterp {
namespace cpu {
namespace FI_ARCH {
namespace {

constexpr std::int64_t kLanes = 256;               // pooled elements of a row worked on at a time
constexpr std::int64_t kBlock = 16;                // narrow planes worked on at a time
constexpr std::int64_t kBlockPlane = 1 << 15;      // elements of the largest such plane
constexpr std::int64_t kNarrow = 32;               // columns below which pooled planes are narrow
constexpr std::int64_t kSerialElements = 1 << 15;  // map elements below which threads cost more

std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

bool parallel(const MaxPool2d& p) {
  return p.threads > 1 && p.examples * p.channels * p.height * p.width >= kSerialElements;
}

// The first largest element wins, and a NaN wins over all before it. Offsets are kept as A
// meanwhile, so that all lanes have one width. P is A or a vector of A.
template <typename A, typename P>
inline void take_larger(P v, A number, P& best, P& where) {
  const auto take = (v > best) | (v != v) | (where == A(kNoOffset));
  best = take ? v : best;
  where = take ? P{} + number : where;
}

// ---- channels last: lanes are the channels of a position ----

// The positions that one position draws from, and the number of each in its window.
struct Sources {
  std::int64_t count = 0;
  std::int64_t at[kNoOffset], number[kNoOffset];
  void add(std::int64_t position, std::int64_t k) {
    at[count] = position;
    number[count++] = k;
  }
};

// Elements a of the window at `position` along an axis that are inside the map.
Sources elements(const MaxPool2d& p, int axis, std::int64_t position) {
  const std::int64_t size = axis == 0 ? p.height : p.width;
  const std::int64_t start = position * p.stride[axis] - p.padding[axis];
  Sources found;
  for (std::int64_t a = 0; a < p.kernel[axis]; ++a) {
    const std::int64_t at = start + a * p.dilation[axis];
    if (at >= 0 && at < size) found.add(at, a);
  }
  return found;
}

// Windows along an axis whose element a is the `position` of the map.
Sources windows(const MaxPool2d& p, int axis, std::int64_t position) {
  const std::int64_t count = axis == 0 ? p.pooled_height : p.pooled_width;
  const auto step = static_cast<std::uint32_t>(p.stride[axis]);  // 32-bit division is much faster
  Sources found;
  for (std::int64_t a = 0; a < p.kernel[axis]; ++a) {
    const std::int64_t start = position + p.padding[axis] - a * p.dilation[axis];
    if (start < 0) continue;
    const auto from = static_cast<std::uint32_t>(start);
    const std::int64_t window = from / step;
    if (from % step == 0 && window < count) found.add(window, a);
  }
  return found;
}

// f(first channel, P{}), P being a vector of A for as long as there are enough channels.
template <typename A, typename F>
void for_channels(std::int64_t channels, F f) {
  using V = typename Vector<A>::type;
  std::int64_t c = 0;
  for (; c + Vector<A>::lanes <= channels; c += Vector<A>::lanes) f(c, V{});
  for (; c < channels; ++c) f(c, A{});
}

// f(position, its sources) for every position of a (planes, height, width) tensor; the sources lie
// in one of (planes, from_height, from_width) and are what `find` gives along each axis.
template <typename Find, typename F>
void for_positions(const MaxPool2d& p, std::int64_t height, std::int64_t width,
                   std::int64_t from_height, std::int64_t from_width, Find find, F f) {
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p))
  for (std::int64_t row = 0; row < p.examples * height; ++row) {
    const Sources rows = find(p, 0, row % height);
    const std::int64_t plane = row / height * from_height;
    for (std::int64_t j = 0; j < width; ++j) {
      const Sources columns = find(p, 1, j);
      Sources both;
      for (std::int64_t a = 0; a < rows.count; ++a) {
        const std::int64_t at = (plane + rows.at[a]) * from_width;
        for (std::int64_t b = 0; b < columns.count; ++b) {
          both.add(at + columns.at[b], rows.number[a] * p.kernel[1] + columns.number[b]);
        }
      }
      f(row * width + j, both);
    }
  }
}

// The same over the windows and their elements, and over the map and the windows that cover it.
template <typename F>
void for_windows(const MaxPool2d& p, F f) {
  for_positions(p, p.pooled_height, p.pooled_width, p.height, p.width, elements, f);
}
template <typename F>
void for_map(const MaxPool2d& p, F f) {
  for_positions(p, p.height, p.width, p.pooled_height, p.pooled_width, windows, f);
}

template <typename T>
void forward_last(const MaxPool2d& p) {
  using A = acc_t<T>;
  for_windows(p, [&](std::int64_t o, const Sources& s) {
    for_channels<A>(p.channels, [&](std::int64_t c, auto zero) {
      using P = decltype(zero);
      P best = zero - A(__builtin_inf()), where = zero + A(kNoOffset);
      for (std::int64_t e = 0; e < s.count; ++e) {
        const T* map = static_cast<const T*>(p.map) + s.at[e] * p.channels + c;
        take_larger<A, P>(Pack<P>::load_from(map), static_cast<A>(s.number[e]), best, where);
      }
      Pack<P>::store_to(static_cast<T*>(p.pooled) + o * p.channels + c, best);
      Pack<P>::store_to(p.offsets + o * p.channels + c, where);
    });
  });
}

template <typename T>
void backward_last(const MaxPool2d& p) {
  using A = acc_t<T>;
  for_map(p, [&](std::int64_t m, const Sources& s) {
    for_channels<A>(p.channels, [&](std::int64_t c, auto zero) {
      using P = decltype(zero);
      P sum = zero;
      for (std::int64_t e = 0; e < s.count; ++e) {
        const std::int64_t at = s.at[e] * p.channels + c;
        const P grad = Pack<P>::load_from(static_cast<const T*>(p.pooled) + at);
        sum += Pack<P>::load_from(p.offsets + at) == static_cast<A>(s.number[e]) ? grad : zero;
      }
      Pack<P>::store_to(static_cast<T*>(p.map) + m * p.channels + c, sum);
    });
  });
}

template <typename T>
void gather_last(const MaxPool2d& p) {
  using A = acc_t<T>;
  for_windows(p, [&](std::int64_t o, const Sources& s) {
    for_channels<A>(p.channels, [&](std::int64_t c, auto zero) {
      using P = decltype(zero);
      const P where = Pack<P>::load_from(p.offsets + o * p.channels + c);
      P found = zero;
      for (std::int64_t e = 0; e < s.count; ++e) {
        const T* map = static_cast<const T*>(p.map) + s.at[e] * p.channels + c;
        found = where == static_cast<A>(s.number[e]) ? Pack<P>::load_from(map) : found;
      }
      Pack<P>::store_to(static_cast<T*>(p.pooled) + o * p.channels + c, found);
    });
  });
}

// ---- NCHW ----

// Calls f with the step as a constant where that lets the compiler vectorise.
template <typename F>
void with_step(std::int64_t step, F f) {
  if (step == 1) return f([](std::int64_t l) { return l; });
  if (step == 2) return f([](std::int64_t l) { return 2 * l; });
  f([step](std::int64_t l) { return step * l; });
}

// Wide planes: lanes are neighbours in a row of `pooled`.
template <typename T>
void forward_rows(const MaxPool2d& p) {
  using A = acc_t<T>;
  const std::int64_t rows = p.examples * p.channels * p.pooled_height, step = p.stride[1];
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p))
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t plane = row / p.pooled_height, i = row % p.pooled_height;
    for (std::int64_t j = 0; j < p.pooled_width; j += kLanes) {
      const std::int64_t lanes = smaller(kLanes, p.pooled_width - j);
      A best[kLanes], where[kLanes];
      for (std::int64_t l = 0; l < lanes; ++l) best[l] = -A(__builtin_inf()), where[l] = kNoOffset;
      for (std::int64_t k = 0; k < p.kernel[0] * p.kernel[1]; ++k) {
        const std::int64_t a = k / p.kernel[1], b = k % p.kernel[1];
        const std::int64_t h = i * p.stride[0] - p.padding[0] + a * p.dilation[0];
        const std::int64_t w = j * step - p.padding[1] + b * p.dilation[1];  // of the first lane
        if (h < 0 || h >= p.height || w >= p.width) continue;
        const std::int64_t begin = w < 0 ? (step - 1 - w) / step : 0;
        const std::int64_t end = smaller(lanes, (p.width - 1 - w) / step + 1);
        const T* map = static_cast<const T*>(p.map) + (plane * p.height + h) * p.width +
                       (w + begin * step);
        const A number = static_cast<A>(k);
        A *first = best + begin, *first_where = where + begin;
        with_step(step, [&](auto place) {
#pragma omp simd
          for (std::int64_t l = 0; l < end - begin; ++l) {
            take_larger<A>(load(map + place(l)), number, first[l], first_where[l]);
          }
        });
      }
      T* pooled = static_cast<T*>(p.pooled) + row * p.pooled_width + j;
      std::uint8_t* offsets = p.offsets + row * p.pooled_width + j;
#pragma omp simd
      for (std::int64_t l = 0; l < lanes; ++l) store(pooled + l, best[l]);
#pragma omp simd
      for (std::int64_t l = 0; l < lanes; ++l) Pack<A>::store_to(offsets + l, where[l]);
    }
  }
}

bool by_blocks(const MaxPool2d& p) {
  return !p.channels_last && p.pooled_width < kNarrow && p.height * p.width <= kBlockPlane;
}

std::int64_t block_bytes(const MaxPool2d& p, std::int64_t element) {
  const std::int64_t bytes = p.height * p.width * element +
                             p.pooled_height * p.pooled_width * (element + 1);
  return (bytes * kBlock + 63) / 64 * 64;
}

// Narrow planes: a block of them is brought into channels_last and worked on there.
template <typename T>
void forward_blocks(const MaxPool2d& p) {
  const std::int64_t planes = p.examples * p.channels;
  const std::int64_t size = p.height * p.width, pooled_size = p.pooled_height * p.pooled_width;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p))
  for (std::int64_t first = 0; first < planes; first += kBlock) {
    const std::int64_t lanes = smaller(kBlock, planes - first);
    MaxPool2d block = p;
    block.examples = block.threads = 1;
    block.channels = kBlock;
    T* map = reinterpret_cast<T*>(static_cast<char*>(p.scratch) +
                                  thread_index() * block_bytes(p, sizeof(T)));
    T* pooled = map + size * kBlock;
    block.map = map;
    block.pooled = pooled;
    block.offsets = reinterpret_cast<std::uint8_t*>(pooled + pooled_size * kBlock);
    const T* from = static_cast<const T*>(p.map) + first * size;
    for (std::int64_t m = 0; m < size; ++m) {
      for (std::int64_t l = 0; l < lanes; ++l) map[m * kBlock + l] = from[l * size + m];
      for (std::int64_t l = lanes; l < kBlock; ++l) map[m * kBlock + l] = T{};
    }
    forward_last<T>(block);
    T* to = static_cast<T*>(p.pooled) + first * pooled_size;
    std::uint8_t* offsets = p.offsets + first * pooled_size;
    for (std::int64_t l = 0; l < lanes; ++l) {
      for (std::int64_t o = 0; o < pooled_size; ++o) {
        to[l * pooled_size + o] = pooled[o * kBlock + l];
        offsets[l * pooled_size + o] = block.offsets[o * kBlock + l];
      }
    }
  }
}

// Where the elements of a window lie in a plane of the map, counted from the window's start.
struct Places {
  std::int64_t at[kNoOffset];
  explicit Places(const MaxPool2d& p) {
    for (std::int64_t k = 0; k < p.kernel[0] * p.kernel[1]; ++k) {
      at[k] = k / p.kernel[1] * p.dilation[0] * p.width + k % p.kernel[1] * p.dilation[1];
    }
  }
};

// f(o, m) for every window of a plane that has an element: `pooled` at o came from the map at m.
template <typename F>
void for_sources(const MaxPool2d& p, const Places& places, const std::uint8_t* offsets, F f) {
  for (std::int64_t i = 0; i < p.pooled_height; ++i) {
    const std::int64_t start = (i * p.stride[0] - p.padding[0]) * p.width - p.padding[1];
    for (std::int64_t j = 0; j < p.pooled_width; ++j) {
      const std::int64_t o = i * p.pooled_width + j;
      if (offsets[o] != kNoOffset) f(o, start + j * p.stride[1] + places.at[offsets[o]]);
    }
  }
}

// Sums go through a plane of A where T is narrower.
template <typename T>
void backward_planes(const MaxPool2d& p) {
  using A = acc_t<T>;
  const Places places(p);
  const std::int64_t size = p.height * p.width, windows = p.pooled_height * p.pooled_width;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p))
  for (std::int64_t plane = 0; plane < p.examples * p.channels; ++plane) {
    const T* pooled = static_cast<const T*>(p.pooled) + plane * windows;
    T* map = static_cast<T*>(p.map) + plane * size;
    A* sums;
    if constexpr (sizeof(A) == sizeof(T)) {
      sums = map;
    } else {
      sums = static_cast<A*>(p.scratch) + thread_index() * size;
    }
    for (std::int64_t m = 0; m < size; ++m) sums[m] = 0;
    for_sources(p, places, p.offsets + plane * windows,
                [&](std::int64_t o, std::int64_t m) { sums[m] += load(pooled + o); });
    if constexpr (sizeof(A) != sizeof(T)) {
#pragma omp simd
      for (std::int64_t m = 0; m < size; ++m) store(map + m, sums[m]);
    }
  }
}

template <typename T>
void gather_planes(const MaxPool2d& p) {
  const Places places(p);
  const std::int64_t size = p.height * p.width, windows = p.pooled_height * p.pooled_width;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p))
  for (std::int64_t plane = 0; plane < p.examples * p.channels; ++plane) {
    const T* map = static_cast<const T*>(p.map) + plane * size;
    T* pooled = static_cast<T*>(p.pooled) + plane * windows;
    for (std::int64_t o = 0; o < windows; ++o) pooled[o] = T{};
    for_sources(p, places, p.offsets + plane * windows,
                [&](std::int64_t o, std::int64_t m) { pooled[o] = map[m]; });
  }
}

}  // namespace

std::int64_t max_pool2d_scratch_bytes(const MaxPool2d& p) {
  const std::int64_t element = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
  const std::int64_t blocks = by_blocks(p) ? block_bytes(p, element) : 0;
  const std::int64_t sums = p.channels_last || element != 2 ? 0 : p.height * p.width * 4;
  return p.threads * (blocks > sums ? blocks : sums);
}

void max_pool2d(const MaxPool2d& p) {
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.channels_last ? forward_last<T>(p) : by_blocks(p) ? forward_blocks<T>(p) : forward_rows<T>(p);
  });
}

void max_pool2d_backward(const MaxPool2d& p) {
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.channels_last ? backward_last<T>(p) : backward_planes<T>(p);
  });
}

void max_pool2d_backward_backward(const MaxPool2d& p) {
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.channels_last ? gather_last<T>(p) : gather_planes<T>(p);
  });
}

}  // namespace FI_ARCH
}  // namespace cpu
}  // namespace fastinterp
