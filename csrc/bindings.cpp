// The only file that sees Python. Tensors arrive as addresses, sizes and strides; shapes and dtypes
// were checked in fastinterp/ops.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels.h"

namespace py = pybind11;
using namespace fastinterp;

namespace {

using Address = std::uintptr_t;
using Strides = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

FeatureStrides feature_strides(const Strides& s) {
  return {std::get<0>(s), std::get<1>(s), std::get<2>(s)};
}

DType cpu_dtype(int code) {
  if (code < 0 || code > static_cast<int>(DType::bf16)) {
    throw std::invalid_argument("no CPU kernel for dtype code " + std::to_string(code));
  }
  return static_cast<DType>(code);
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<void, Free>;

Scratch allocate(std::int64_t bytes) {
  const std::size_t rounded = (static_cast<std::size_t>(bytes) / 64 + 1) * 64;
  void* p = std::aligned_alloc(64, rounded);
  if (p == nullptr) throw std::bad_alloc();
  return Scratch(p);
}

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
  py::gil_scoped_release release;
  const int code = cuda::attack_step(p, pointer(stream));
  if (code != 0) {
    py::gil_scoped_acquire acquire;
    throw std::runtime_error(std::string("attack_step on CUDA: ") + cuda::error_string(code));
  }
}
#endif

CamDiscrepancy cam_discrepancy_params(int dtype, int norm, std::int64_t examples,
                                      std::int64_t channels, std::int64_t classes,
                                      std::int64_t pixels, Address features,
                                      const Strides& features_strides, Address features_adv,
                                      const Strides& features_adv_strides, Address head,
                                      int threads) {
  CamDiscrepancy p{};
  p.dtype = cpu_dtype(dtype);
  p.norm = static_cast<MapNorm>(norm);
  p.examples = examples;
  p.channels = channels;
  p.classes = classes;
  p.pixels = pixels;
  p.features = pointer(features);
  p.features_strides = feature_strides(features_strides);
  p.features_adv = pointer(features_adv);
  p.features_adv_strides = feature_strides(features_adv_strides);
  p.head = pointer(head);
  p.threads = threads;
  return p;
}

void cpu_cam_discrepancy_forward(int dtype, int norm, std::int64_t examples, std::int64_t channels,
                                 std::int64_t classes, std::int64_t pixels, Address features,
                                 const Strides& features_strides, Address features_adv,
                                 const Strides& features_adv_strides, Address head, int threads,
                                 Address class_weights, Address discrepancy, Address distances) {
  CamDiscrepancy p =
      cam_discrepancy_params(dtype, norm, examples, channels, classes, pixels, features,
                             features_strides, features_adv, features_adv_strides, head, threads);
  p.class_weights = pointer(class_weights);
  p.discrepancy = pointer(discrepancy);
  p.distances = pointer(distances);
  py::gil_scoped_release release;
  const Scratch scratch = allocate(cpu::cam_discrepancy_scratch_bytes(p));
  p.scratch = scratch.get();
  cpu::cam_discrepancy_forward(p);
}

void cpu_cam_discrepancy_backward(int dtype, int norm, std::int64_t examples,
                                  std::int64_t channels, std::int64_t classes, std::int64_t pixels,
                                  Address features, const Strides& features_strides,
                                  Address features_adv, const Strides& features_adv_strides,
                                  Address head, int threads, Address class_grad, Address distances,
                                  Address grad_features_adv, const Strides& grad_strides,
                                  Address grad_head) {
  CamDiscrepancy p =
      cam_discrepancy_params(dtype, norm, examples, channels, classes, pixels, features,
                             features_strides, features_adv, features_adv_strides, head, threads);
  p.class_grad = pointer(class_grad);
  p.distances = pointer(distances);
  p.grad_features_adv = pointer(grad_features_adv);
  p.grad_strides = feature_strides(grad_strides);
  p.grad_head = pointer(grad_head);
  py::gil_scoped_release release;
  const Scratch scratch = allocate(cpu::cam_discrepancy_scratch_bytes(p));
  p.scratch = scratch.get();
  cpu::cam_discrepancy_backward(p);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "fastinterp's compiled kernels; see csrc/kernels.h for the meaning of each argument";
  m.attr("compiler") = FASTINTERP_COMPILER;
  m.attr("instruction_set") = cpu::instruction_set();
  m.def("cpu_attack_step", &cpu_attack_step);
  m.def("cpu_cam_discrepancy_forward", &cpu_cam_discrepancy_forward);
  m.def("cpu_cam_discrepancy_backward", &cpu_cam_discrepancy_backward);
#ifdef FASTINTERP_WITH_CUDA
  m.attr("cuda_architectures") = FASTINTERP_CUDA_ARCHITECTURES;
  m.def("cuda_attack_step", &cuda_attack_step);
#else
  m.attr("cuda_architectures") = py::none();
#endif
}
