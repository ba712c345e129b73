#include "common.h"

namespace fastinterp {
namespace {

CrossEntropy cross_entropy_params(int dtype, int reduction, std::int64_t examples,
                                  std::int64_t classes, double smoothing,
                                  std::int64_t ignore_index, Address logits, Address target,
                                  Address shift, Address scale, int threads) {
  CrossEntropy p{};
  p.dtype = cpu_dtype(dtype);
  p.reduction = static_cast<Reduction>(reduction);
  p.examples = examples;
  p.classes = classes;
  p.smoothing = smoothing;
  p.ignore_index = ignore_index;
  p.logits = pointer(logits);
  p.target = static_cast<const std::int64_t*>(pointer(target));
  p.shift = pointer(shift);
  p.scale = pointer(scale);
  p.threads = threads;
  return p;
}

std::int64_t cpu_cross_entropy(int dtype, int reduction, std::int64_t examples,
                               std::int64_t classes, double smoothing, std::int64_t ignore_index,
                               Address logits, Address target, Address shift, Address scale,
                               int threads, Address losses, Address total) {
  CrossEntropy p = cross_entropy_params(dtype, reduction, examples, classes, smoothing,
                                        ignore_index, logits, target, shift, scale, threads);
  p.losses = pointer(losses);
  p.total = pointer(total);
  py::gil_scoped_release release;
  return cpu::cross_entropy(p);
}

template <void (*kernel)(const CrossEntropy&)>
void run(int dtype, int reduction, std::int64_t examples, std::int64_t classes, double smoothing,
         std::int64_t ignore_index, Address logits, Address target, Address shift, Address scale,
         int threads, Address grad, std::int64_t grad_stride, Address v, Address grad_grad,
         Address grad_logits) {
  CrossEntropy p = cross_entropy_params(dtype, reduction, examples, classes, smoothing,
                                        ignore_index, logits, target, shift, scale, threads);
  p.grad = pointer(grad);
  p.grad_stride = grad_stride;
  p.v = pointer(v);
  p.grad_grad = pointer(grad_grad);
  p.grad_logits = pointer(grad_logits);
  py::gil_scoped_release release;
  kernel(p);
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  m.def("cpu_cross_entropy", &cpu_cross_entropy);
  m.def("cpu_cross_entropy_backward", &run<cpu::cross_entropy_backward>);
  m.def("cpu_cross_entropy_backward_backward", &run<cpu::cross_entropy_backward_backward>);
}

}  // namespace fastinterp
