// What the bindings share. This folder is the only one that sees Python: tensors arrive as addresses,
// sizes and strides; shapes and dtypes were checked in fastinterp/ops.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../kernels.h"

namespace fastinterp {

namespace py = pybind11;

using Address = std::uintptr_t;

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }

inline DType cpu_dtype(int code) {
  if (code < 0 || code > static_cast<int>(DType::bf16)) {
    throw std::invalid_argument("no CPU kernel for dtype code " + std::to_string(code));
  }
  return static_cast<DType>(code);
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<void, Free>;

inline Scratch allocate(std::int64_t bytes) {
  const std::size_t rounded = (static_cast<std::size_t>(bytes) / 64 + 1) * 64;
  void* p = std::aligned_alloc(64, rounded);
  if (p == nullptr) throw std::bad_alloc();
  return Scratch(p);
}

#ifdef FASTINTERP_WITH_CUDA
// Launches a CUDA kernel and raises what the runtime says of it.
template <typename Params>
void launch(const char* name, const Params& p, int (*kernel)(const Params&, void*), Address stream) {
  int code;
  {
    py::gil_scoped_release release;
    code = kernel(p, pointer(stream));
  }
  if (code != 0) {
    throw std::runtime_error(std::string(name) + " on CUDA: " + cuda::error_string(code));
  }
}
#endif

void bind_activation(py::module_& m);
void bind_attack_step(py::module_& m);
void bind_batch_norm_act(py::module_& m);
void bind_cam_discrepancy(py::module_& m);
void bind_conv2d(py::module_& m);
void bind_cross_entropy(py::module_& m);
void bind_kendall_tau(py::module_& m);
void bind_max_pool2d(py::module_& m);
void bind_norm_act(py::module_& m);

}  // namespace fastinterp
