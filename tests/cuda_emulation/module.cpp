// The bindings of the ops that have CUDA kernels, with these kernels compiled for the CPU. The CPU
// kernels that the bindings name as well are not here.
#include "../../csrc/bindings/common.h"

namespace fastinterp {
namespace cpu {
void attack_step(const AttackStep&) { std::abort(); }
std::int64_t batch_norm_act_scratch_bytes(const BatchNormAct&) { std::abort(); }
void batch_norm_act_forward(const BatchNormAct&) { std::abort(); }
void batch_norm_act_backward(const BatchNormAct&) { std::abort(); }
void batch_norm_act_backward_backward(const BatchNormAct&) { std::abort(); }
std::int64_t kendall_tau_scratch_bytes(const KendallTau&) { std::abort(); }
void kendall_tau(const KendallTau&) { std::abort(); }
}  // namespace cpu
}  // namespace fastinterp

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the emulation"; }
}

PYBIND11_MODULE(_emulated, m) {
  m.attr("cuda_architectures") = "80";
  fastinterp::bind_attack_step(m);
  fastinterp::bind_batch_norm_act(m);
  fastinterp::bind_kendall_tau(m);
}
