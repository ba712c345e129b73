#include "common.h"

PYBIND11_MODULE(_core, m) {
  using namespace fastinterp;
  m.doc() = "fastinterp's compiled kernels; see csrc/kernels.h for the meaning of each argument";
  m.attr("compiler") = FASTINTERP_COMPILER;
  m.attr("instruction_set") = cpu::instruction_set();
#ifdef FASTINTERP_WITH_CUDA
  m.attr("cuda_architectures") = FASTINTERP_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_architectures") = py::none();
#endif
  bind_activation(m);
  bind_attack_step(m);
  bind_batch_norm_act(m);
  bind_cam_discrepancy(m);
  bind_conv2d(m);
  bind_cross_entropy(m);
  bind_kendall_tau(m);
  bind_max_pool2d(m);
  bind_norm_act(m);
}
