// The one place where kernels are launched, so that tests/cuda_emulation can run them on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastinterp {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr std::int64_t kMaxGrid = 0x7fffffff;

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, unsigned threads, cudaStream_t stream,
            Args... args) {
  kernel<<<grid, threads, 0, stream>>>(args...);
}

inline unsigned grid_size(std::int64_t blocks) {
  return static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid);
}

// Blocks of at most `most` threads, whole warps, no larger than `needed` asks for.
inline unsigned block_size(std::int64_t needed, int most) {
  const std::int64_t warps = (needed + kWarp - 1) / kWarp, limit = most / kWarp;
  return static_cast<unsigned>((warps < 1 ? 1 : warps < limit ? warps : limit) * kWarp);
}

}  // namespace
}  // namespace cuda
}  // namespace fastinterp
