#include "common.h"

namespace fastinterp {
namespace {

using Pair = std::tuple<std::int64_t, std::int64_t>;

void copy(const Pair& from, std::int64_t* to) { std::tie(to[0], to[1]) = from; }

void cpu_conv2d(int dtype, bool adjoint, std::int64_t examples, std::int64_t in_channels,
                std::int64_t out_channels, Pair in_size, Pair out_size, Pair kernel, Pair stride,
                Pair padding, Pair dilation, std::int64_t weight_out, std::int64_t weight_in,
                Pair weight_tap, Address in, Address weight, Address bias, Address gate,
                bool relu, Address out, int threads) {
  Conv2d p{};
  p.dtype = cpu_dtype(dtype);
  if (p.dtype == DType::bf16 || examples * (p.dtype == DType::f64 ? 8 : 4) < 64) {
    throw std::invalid_argument("cpu_conv2d takes float32 or float64, at least 64 bytes of examples");
  }
  p.adjoint = adjoint;
  p.examples = examples;
  p.in_channels = in_channels;
  p.out_channels = out_channels;
  copy(in_size, p.in_size);
  copy(out_size, p.out_size);
  copy(kernel, p.kernel);
  copy(stride, p.stride);
  copy(padding, p.padding);
  copy(dilation, p.dilation);
  p.weight_out = weight_out;
  p.weight_in = weight_in;
  copy(weight_tap, p.weight_tap);
  p.in = pointer(in);
  p.weight = pointer(weight);
  p.bias = pointer(bias);
  p.gate = pointer(gate);
  p.relu = relu;
  p.out = pointer(out);
  p.threads = threads;
  py::gil_scoped_release release;
  const Scratch scratch = allocate(cpu::conv2d_scratch_bytes(p));
  p.scratch = scratch.get();
  cpu::conv2d(p);
}

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
  m.def("cpu_conv2d", &cpu_conv2d);
  m.attr("amx_bf16") = cpu::amx_bf16();
  if (cpu::amx_bf16()) m.def("cpu_conv2d_weight_grad", &weight_grad);
}

}  // namespace fastinterp
