#include "common.h"

namespace fastinterp {
namespace {

KendallTau kendall_tau_params(int dtype, std::int64_t rows, std::int64_t columns, Address a,
                              Address b, Address tau) {
  KendallTau p{};
  p.dtype = static_cast<DType>(dtype);
  if (p.dtype != DType::f32 && p.dtype != DType::f64) {
    throw std::invalid_argument("kendall_tau has no kernel for dtype code " +
                                std::to_string(dtype));
  }
  p.rows = rows;
  p.columns = columns;
  p.a = pointer(a);
  p.b = pointer(b);
  p.tau = static_cast<double*>(pointer(tau));
  return p;
}

void cpu_kendall_tau(int dtype, std::int64_t rows, std::int64_t columns, Address a, Address b,
                     Address tau, int threads) {
  KendallTau p = kendall_tau_params(dtype, rows, columns, a, b, tau);
  p.threads = threads;
  py::gil_scoped_release release;
  const Scratch scratch = allocate(cpu::kendall_tau_scratch_bytes(p));
  p.scratch = scratch.get();
  cpu::kendall_tau(p);
}

#ifdef FASTINTERP_WITH_CUDA
std::int64_t cuda_kendall_tau_scratch_bytes(std::int64_t rows, std::int64_t columns) {
  return cuda::kendall_tau_scratch_bytes(kendall_tau_params(0, rows, columns, 0, 0, 0));
}

void cuda_kendall_tau(int dtype, std::int64_t rows, std::int64_t columns, Address a, Address b,
                      Address tau, Address scratch, Address stream) {
  KendallTau p = kendall_tau_params(dtype, rows, columns, a, b, tau);
  p.scratch = pointer(scratch);
  launch("kendall_tau", p, cuda::kendall_tau, stream);
}
#endif

}  // namespace

void bind_kendall_tau(py::module_& m) {
  m.def("cpu_kendall_tau", &cpu_kendall_tau);
#ifdef FASTINTERP_WITH_CUDA
  m.def("cuda_kendall_tau_scratch_bytes", &cuda_kendall_tau_scratch_bytes);
  m.def("cuda_kendall_tau", &cuda_kendall_tau);
#endif
}

}  // namespace fastinterp
