#include "common.h"

namespace fastinterp {
namespace {

using Pair = std::tuple<std::int64_t, std::int64_t>;

void copy(const Pair& from, std::int64_t* to) { std::tie(to[0], to[1]) = from; }

void weight_grad(std::int64_t examples, std::int64_t channels, std::int64_t out_channels,
                 Pair x_size, Pair y_size, Pair kernel, Pair stride, Pair padding, Pair dilation,
                 Address gy, Address x, Address gweight, int threads) {
  Conv2dWeightGrad p{};
  p.examples = examples;
  p.channels = channels;
  p.out_channels = out_channels;
  copy(x_size, p.x_size);
  copy(y_size, p.y_size);
  copy(kernel, p.kernel);
  copy(stride, p.stride);
  copy(padding, p.padding);
  copy(dilation, p.dilation);
  p.gy = pointer(gy);
  p.x = pointer(x);
  p.gweight = pointer(gweight);
  p.threads = threads;
  py::gil_scoped_release release;
  const Scratch scratch = allocate(cpu::conv2d_weight_grad_scratch_bytes(p));
  p.scratch = scratch.get();
  cpu::conv2d_weight_grad(p);
}

}  // namespace

void bind_conv2d(py::module_& m) {
  m.attr("amx_bf16") = cpu::amx_bf16();
  if (cpu::amx_bf16()) m.def("cpu_conv2d_weight_grad", &weight_grad);
}

}  // namespace fastinterp
