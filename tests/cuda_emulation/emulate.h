// Runs CUDA kernels on a CPU: every thread of a block is a fiber, blocks run one after the other, and
// a barrier or a warp's exchange lets the other fibers run until all have come. So a missing barrier
// can show, since fibers run in an unusual order, a deadlock does, and sanitizers see every access.
#pragma once

#include <cuda_runtime.h>
#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#undef __shared__
#define __shared__ static  // one block at a time
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emulation {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 1 << 18;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  int barriers = 0;   // how many it has come to
  int exchanges = 0;  // with its warp
  std::uint64_t given[2] = {0, 0};  // in the exchanges, by turns
};

struct Block {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_size = 0;
  std::function<void()> body;
  int current = 0;
};
inline Block block;
inline dim3 thread_index, block_index, block_size, grid_size;

inline void to_fiber(int i) {
  block.current = i;
  thread_index = dim3(i);
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, block.fibers[i].stack.get(), kStack);
#endif
  swapcontext(&block.scheduler, &block.fibers[i].context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void to_scheduler(bool ends) {
  Fiber& own = block.fibers[block.current];
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(ends ? nullptr : &fake, block.scheduler_stack,
                                 block.scheduler_size);
#endif
  own.done = ends;
  swapcontext(&own.context, &block.scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_size);
#endif
  block.body();
  to_scheduler(true);
}

// Waits until the fibers from `first` on, `count` of them, have come as far in `counter`.
inline void wait(int Fiber::*counter, int first, int count) {
  const int own = ++(block.fibers[block.current].*counter);
  for (;;) {
    bool all = true;
    for (int i = first; i < first + count; ++i) {
      const Fiber& other = block.fibers[i];
      if (other.done && other.*counter < own) std::abort();  // it will never come
      all = all && other.*counter >= own;
    }
    if (all) return;
    to_scheduler(false);
  }
}

template <typename V>
V exchange(V value, int from) {
  static_assert(sizeof(V) <= 8, "");
  Fiber& own = block.fibers[block.current];
  const int first = block.current / kWarp * kWarp, turn = own.exchanges % 2;
  std::memcpy(&own.given[turn], &value, sizeof value);
  wait(&Fiber::exchanges, first, kWarp);
  std::memcpy(&value, &block.fibers[first + from % kWarp].given[turn], sizeof value);
  return value;
}

template <typename... Params, typename... Args>
void run(void (*kernel)(Params...), dim3 grid, unsigned threads, Args... args) {
  if (threads == 0 || threads % kWarp != 0 || threads > 1024) std::abort();
  grid_size = grid;
  block_size = dim3(threads);
  if (block.fibers.size() < threads) block.fibers = std::vector<Fiber>(threads);
  block.body = [&] { kernel(args...); };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      block_index = dim3(x, y);
      for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = block.fibers[i];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        fiber.done = false;
        fiber.barriers = fiber.exchanges = 0;
        makecontext(&fiber.context, enter, 0);
      }
      for (bool left = true; left;) {
        left = false;
        for (unsigned i = threads; i-- > 0;) {  // the last one first
          if (block.fibers[i].done) continue;
          to_fiber(static_cast<int>(i));
          left = true;
        }
      }
    }
  }
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

inline void __syncthreads() {
  emulation::wait(&emulation::Fiber::barriers, 0, static_cast<int>(emulation::block_size.x));
}
template <typename V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  return emulation::exchange(value, (emulation::block.current % emulation::kWarp) ^ mask);
}
