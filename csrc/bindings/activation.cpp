#include "common.h"

namespace fastinterp {
namespace {

template <void (*kernel)(const ActivationPass&)>
void run(int dtype, int kind, double alpha, std::int64_t count, Address z, Address gy, Address v,
         Address out, Address gz2, int threads) {
  ActivationPass p{};
  p.dtype = cpu_dtype(dtype);
  p.kind = static_cast<Activation>(kind);
  p.alpha = alpha;
  p.count = count;
  p.z = pointer(z);
  p.gy = pointer(gy);
  p.v = pointer(v);
  p.y = p.gz = p.ggy = pointer(out);
  p.gz2 = pointer(gz2);
  p.threads = threads;
  py::gil_scoped_release release;
  kernel(p);
}

}  // namespace

void bind_activation(py::module_& m) {
  m.def("cpu_activation", &run<cpu::activation>);
  m.def("cpu_activation_backward", &run<cpu::activation_backward>);
  m.def("cpu_activation_backward_backward", &run<cpu::activation_backward_backward>);
}

}  // namespace fastinterp
