#include "common.h"

namespace fastinterp {
namespace {

AttackStep attack_step_params(int dtype, int norm, std::int64_t examples, std::int64_t inner,
                              Address x, Address grad, Address origin, Address out, Address eps,
                              std::int64_t eps_stride, Address step_size, std::int64_t step_stride,
                              double clip_min, double clip_max) {
  AttackStep p{};
  p.dtype = static_cast<DType>(dtype);
  p.norm = static_cast<StepNorm>(norm);
  p.examples = examples;
  p.inner = inner;
  p.x = pointer(x);
  p.grad = pointer(grad);
  p.origin = pointer(origin);
  p.out = pointer(out);
  p.eps = pointer(eps);
  p.eps_stride = eps_stride;
  p.step_size = pointer(step_size);
  p.step_stride = step_stride;
  p.clip_min = clip_min;
  p.clip_max = clip_max;
  return p;
}

void cpu_attack_step(int dtype, int norm, std::int64_t examples, std::int64_t inner, Address x,
                     Address grad, Address origin, Address out, Address eps,
                     std::int64_t eps_stride, Address step_size, std::int64_t step_stride,
                     double clip_min, double clip_max, int threads) {
  AttackStep p = attack_step_params(dtype, norm, examples, inner, x, grad, origin, out, eps,
                                    eps_stride, step_size, step_stride, clip_min, clip_max);
  p.dtype = cpu_dtype(dtype);
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::attack_step(p);
}

#ifdef FASTINTERP_WITH_CUDA
void cuda_attack_step(int dtype, int norm, std::int64_t examples, std::int64_t inner, Address x,
                      Address grad, Address origin, Address out, Address eps,
                      std::int64_t eps_stride, Address step_size, std::int64_t step_stride,
                      double clip_min, double clip_max, Address stream) {
  const AttackStep p =
      attack_step_params(dtype, norm, examples, inner, x, grad, origin, out, eps, eps_stride,
                         step_size, step_stride, clip_min, clip_max);
  launch("attack_step", p, cuda::attack_step, stream);
}
#endif

}  // namespace

void bind_attack_step(py::module_& m) {
  m.def("cpu_attack_step", &cpu_attack_step);
#ifdef FASTINTERP_WITH_CUDA
  m.def("cuda_attack_step", &cuda_attack_step);
#endif
}

}  // namespace fastinterp
