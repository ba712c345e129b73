#include "common.h"

namespace fastinterp {
namespace {

using Pair = std::tuple<std::int64_t, std::int64_t>;
using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

void set(std::int64_t (&target)[2], const Pair& pair) {
  std::tie(target[0], target[1]) = pair;
}

MaxPool2d max_pool2d_params(int dtype, bool channels_last, const Shape& shape,
                            const Pair& pooled_size, const Pair& kernel, const Pair& stride,
                            const Pair& padding, const Pair& dilation, Address map, Address pooled,
                            Address offsets, int threads) {
  MaxPool2d p{};
  p.dtype = cpu_dtype(dtype);
  p.channels_last = channels_last;
  std::tie(p.examples, p.channels, p.height, p.width) = shape;
  std::tie(p.pooled_height, p.pooled_width) = pooled_size;
  set(p.kernel, kernel);
  set(p.stride, stride);
  set(p.padding, padding);
  set(p.dilation, dilation);
  p.map = pointer(map);
  p.pooled = pointer(pooled);
  p.offsets = static_cast<std::uint8_t*>(pointer(offsets));
  p.threads = threads;
  return p;
}

template <void (*kernel)(const MaxPool2d&)>
void run(int dtype, bool channels_last, const Shape& shape, const Pair& pooled_size,
         const Pair& window, const Pair& stride, const Pair& padding, const Pair& dilation,
         Address map, Address pooled, Address offsets, int threads) {
  MaxPool2d p = max_pool2d_params(dtype, channels_last, shape, pooled_size, window, stride, padding,
                                  dilation, map, pooled, offsets, threads);
  py::gil_scoped_release release;
  const Scratch scratch = allocate(cpu::max_pool2d_scratch_bytes(p));
  p.scratch = scratch.get();
  kernel(p);
}

}  // namespace

void bind_max_pool2d(py::module_& m) {
  m.def("cpu_max_pool2d", &run<cpu::max_pool2d>);
  m.def("cpu_max_pool2d_backward", &run<cpu::max_pool2d_backward>);
  m.def("cpu_max_pool2d_backward_backward", &run<cpu::max_pool2d_backward_backward>);
}

}  // namespace fastinterp
