#include "arch.h"

namespace fastinterp {
namespace cpu {
namespace FI_ARCH {
namespace {

constexpr std::int64_t kLanes = 256;  // neighbours in memory worked on at a time
constexpr std::int64_t kSerialElements = 1 << 15;  // map elements below which threads cost more

std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

bool parallel(const MaxPool2d& p) {
  return p.threads > 1 && p.examples * p.channels * p.height * p.width >= kSerialElements;
}

// Lanes are neighbours in memory of one row of `pooled`: channels of one position where they are
// last, positions otherwise.
struct Line {
  std::int64_t row;    // n * h + i, or (n * C + c) * h + i
  std::int64_t i, j;   // position of the first lane
  std::int64_t first;  // its channel where channels are last
  std::int64_t lanes;
  std::int64_t pooled;  // its index in `pooled` and `offsets`
};

template <typename F>
void for_each_line(const MaxPool2d& p, F f) {
  const std::int64_t planes = p.channels_last ? p.examples : p.examples * p.channels;
  const std::int64_t rows = planes * p.pooled_height;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p))
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t i = row % p.pooled_height;
    if (p.channels_last) {
      for (std::int64_t j = 0; j < p.pooled_width; ++j) {
        const std::int64_t start = (row * p.pooled_width + j) * p.channels;
        for (std::int64_t c = 0; c < p.channels; c += kLanes) {
          f(Line{row, i, j, c, smaller(kLanes, p.channels - c), start + c});
        }
      }
    } else {
      for (std::int64_t j = 0; j < p.pooled_width; j += kLanes) {
        f(Line{row, i, j, 0, smaller(kLanes, p.pooled_width - j), row * p.pooled_width + j});
      }
    }
  }
}

// Calls f(k, at, begin, end, step) for every element k of the windows: the lanes [begin, end) have
// it inside the map, the first of them at map[at], the others `step` further each.
template <typename F>
void for_each_element(const MaxPool2d& p, const Line& line, F f) {
  const std::int64_t top = line.i * p.stride[0] - p.padding[0];
  const std::int64_t left = line.j * p.stride[1] - p.padding[1];
  const std::int64_t plane = line.row / p.pooled_height, step = p.stride[1];
  for (std::int64_t a = 0; a < p.kernel[0]; ++a) {
    const std::int64_t h = top + a * p.dilation[0];
    if (h < 0 || h >= p.height) continue;
    const std::int64_t row = (plane * p.height + h) * p.width;
    for (std::int64_t b = 0; b < p.kernel[1]; ++b) {
      const std::int64_t k = a * p.kernel[1] + b, w = left + b * p.dilation[1];
      if (p.channels_last) {
        if (w < 0 || w >= p.width) continue;
        f(k, (row + w) * p.channels + line.first, 0, line.lanes, 1);
      } else {
        const std::int64_t begin = w < 0 ? (step - 1 - w) / step : 0;
        std::int64_t end = line.lanes;
        if (w + (end - 1) * step >= p.width) end = w >= p.width ? 0 : (p.width - 1 - w) / step + 1;
        if (begin < end) f(k, row + w + begin * step, begin, end, step);
      }
    }
  }
}

// Calls f with the step as a constant where that lets the compiler vectorise.
template <typename F>
void with_step(std::int64_t step, F f) {
  if (step == 1) return f([](std::int64_t l) { return l; });
  if (step == 2) return f([](std::int64_t l) { return 2 * l; });
  f([step](std::int64_t l) { return step * l; });
}

// The first largest element of a window wins, and a NaN wins over all before it. Offsets are kept as
// A meanwhile, so that all lanes have one width.
template <typename T>
void forward(const MaxPool2d& p) {
  using A = acc_t<T>;
  const T* map = static_cast<const T*>(p.map);
  for_each_line(p, [&](const Line& line) {
    A best[kLanes], where[kLanes];
    for (std::int64_t l = 0; l < line.lanes; ++l) best[l] = -A(__builtin_inf()), where[l] = kNoOffset;
    for_each_element(p, line, [&](std::int64_t k, std::int64_t at, std::int64_t begin,
                                  std::int64_t end, std::int64_t step) {
      const A number = static_cast<A>(k);
      A *b = best + begin, *o = where + begin;
      with_step(step, [&](auto place) {
#pragma omp simd
        for (std::int64_t l = 0; l < end - begin; ++l) {
          const A v = load(map + at + place(l)), old = b[l], seen = o[l];
          const bool take = (v > old) | (v != v) | (seen == A(kNoOffset));
          b[l] = take ? v : old;
          o[l] = take ? number : seen;
        }
      });
    });
    T* pooled = static_cast<T*>(p.pooled) + line.pooled;
    std::uint8_t* offsets = p.offsets + line.pooled;
#pragma omp simd
    for (std::int64_t l = 0; l < line.lanes; ++l) {
      store(pooled + l, best[l]);
      offsets[l] = static_cast<std::uint8_t>(static_cast<int>(where[l]));
    }
  });
}

// Where the elements of a window lie in a plane of the map, counted from the window's start.
struct Places {
  std::int64_t at[256];
  explicit Places(const MaxPool2d& p) {
    for (std::int64_t k = 0; k < p.kernel[0] * p.kernel[1]; ++k) {
      at[k] = k / p.kernel[1] * p.dilation[0] * p.width + k % p.kernel[1] * p.dilation[1];
    }
  }
};

// f(o, m) for every window of a plane that has an element: `pooled` at o came from the map at m.
template <typename F>
void for_each_source(const MaxPool2d& p, const Places& places, const std::uint8_t* offsets, F f) {
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
    for_each_source(p, places, p.offsets + plane * windows,
                    [&](std::int64_t o, std::int64_t m) { sums[m] += load(pooled + o); });
    if constexpr (sizeof(A) != sizeof(T)) {
#pragma omp simd
      for (std::int64_t m = 0; m < size; ++m) store(map + m, sums[m]);
    }
  }
}

// Channels last: every position of the map collects from the windows that cover it.
template <typename T>
void backward_positions(const MaxPool2d& p) {
  using A = acc_t<T>;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel(p))
  for (std::int64_t row = 0; row < p.examples * p.height; ++row) {
    const std::int64_t n = row / p.height, h = row % p.height;
    for (std::int64_t w = 0; w < p.width; ++w) {
      for (std::int64_t c = 0; c < p.channels; c += kLanes) {
        const std::int64_t lanes = smaller(kLanes, p.channels - c);
        A sums[kLanes];
        for (std::int64_t l = 0; l < lanes; ++l) sums[l] = 0;
        for (std::int64_t a = 0; a < p.kernel[0]; ++a) {
          const std::int64_t y = h + p.padding[0] - a * p.dilation[0], i = y / p.stride[0];
          if (y < 0 || y % p.stride[0] != 0 || i >= p.pooled_height) continue;
          for (std::int64_t b = 0; b < p.kernel[1]; ++b) {
            const std::int64_t x = w + p.padding[1] - b * p.dilation[1], j = x / p.stride[1];
            if (x < 0 || x % p.stride[1] != 0 || j >= p.pooled_width) continue;
            const std::int64_t at =
                ((n * p.pooled_height + i) * p.pooled_width + j) * p.channels + c;
            const T* pooled = static_cast<const T*>(p.pooled) + at;
            const std::uint8_t* offsets = p.offsets + at;
            const A number = static_cast<A>(a * p.kernel[1] + b);
#pragma omp simd
            for (std::int64_t l = 0; l < lanes; ++l) {
              const A g = load(pooled + l);
              sums[l] += static_cast<A>(offsets[l]) == number ? g : A(0);
            }
          }
        }
        T* map = static_cast<T*>(p.map) + (row * p.width + w) * p.channels + c;
#pragma omp simd
        for (std::int64_t l = 0; l < lanes; ++l) store(map + l, sums[l]);
      }
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
    for_each_source(p, places, p.offsets + plane * windows,
                    [&](std::int64_t o, std::int64_t m) { pooled[o] = map[m]; });
  }
}

template <typename T>
void gather_positions(const MaxPool2d& p) {
  using A = acc_t<T>;
  const T* map = static_cast<const T*>(p.map);
  for_each_line(p, [&](const Line& line) {
    const std::uint8_t* offsets = p.offsets + line.pooled;
    A found[kLanes];
    for (std::int64_t l = 0; l < line.lanes; ++l) found[l] = 0;
    for_each_element(p, line, [&](std::int64_t k, std::int64_t at, std::int64_t, std::int64_t,
                                  std::int64_t) {
      const A number = static_cast<A>(k);
#pragma omp simd
      for (std::int64_t l = 0; l < line.lanes; ++l) {
        const A v = load(map + at + l), old = found[l];
        found[l] = static_cast<A>(offsets[l]) == number ? v : old;
      }
    });
    T* pooled = static_cast<T*>(p.pooled) + line.pooled;
#pragma omp simd
    for (std::int64_t l = 0; l < line.lanes; ++l) store(pooled + l, found[l]);
  });
}

}  // namespace

std::int64_t max_pool2d_scratch_bytes(const MaxPool2d& p) {
  if (p.channels_last || p.dtype == DType::f32 || p.dtype == DType::f64) return 0;
  return p.threads * p.height * p.width * static_cast<std::int64_t>(sizeof(float));
}

void max_pool2d(const MaxPool2d& p) {
  with_dtype(p.dtype, [&](auto element) { forward<decltype(element)>(p); });
}

void max_pool2d_backward(const MaxPool2d& p) {
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.channels_last ? backward_positions<T>(p) : backward_planes<T>(p);
  });
}

void max_pool2d_backward_backward(const MaxPool2d& p) {
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.channels_last ? gather_positions<T>(p) : gather_planes<T>(p);
  });
}

}  // namespace FI_ARCH
}  // namespace cpu
}  // namespace fastinterp
