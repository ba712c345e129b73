// Chooses the instruction-set variant once, from what the processor reports.
#include "variants.h"

#ifdef FASTINTERP_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

FI_VARIANT(baseline)
#ifdef FASTINTERP_X86
FI_VARIANT(avx2)
FI_VARIANT(avx512)
#endif

namespace fastinterp {
namespace cpu {

namespace {

enum class Level { baseline, avx2, avx512 };

Level detect() {
#ifdef FASTINTERP_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Level::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Level::avx2;
#endif
  return Level::baseline;
}

Level level() {
  static const Level chosen = detect();
  return chosen;
}

}  // namespace

#ifdef FASTINTERP_X86
#define FI_CALL(call)                            \
  switch (level()) {                             \
    case Level::avx512:                          \
      return avx512::call;                       \
    case Level::avx2:                            \
      return avx2::call;                         \
    default:                                     \
      return baseline::call;                     \
  }
#else
#define FI_CALL(call) return baseline::call;
#endif

const char* instruction_set() {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(level())];
}
#ifdef FASTINTERP_AMX
namespace {

bool ask_for_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;  // of leaf 7, edx
  if (level() != Level::avx512 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & bf16) == 0 || (d & tile) == 0) return false;
  // The kernel hands out the tiles' state to processes that ask: ARCH_REQ_XCOMP_PERM, XTILEDATA.
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

}  // namespace

bool amx_bf16() {
  static const bool granted = ask_for_tiles();
  return granted;
}
#else
bool amx_bf16() { return false; }
std::int64_t conv2d_weight_grad_scratch_bytes(const Conv2dWeightGrad&) { return 0; }
void conv2d_weight_grad(const Conv2dWeightGrad&) {}
#endif
void attack_step(const AttackStep& p) { FI_CALL(attack_step(p)) }
std::int64_t conv2d_scratch_bytes(const Conv2d& p) { FI_CALL(conv2d_scratch_bytes(p)) }
void conv2d(const Conv2d& p) { FI_CALL(conv2d(p)) }
std::int64_t kendall_tau_scratch_bytes(const KendallTau& p) {
  FI_CALL(kendall_tau_scratch_bytes(p))
}
void kendall_tau(const KendallTau& p) { FI_CALL(kendall_tau(p)) }
std::int64_t cam_discrepancy_scratch_bytes(const CamDiscrepancy& p) {
  FI_CALL(cam_discrepancy_scratch_bytes(p))
}
void cam_discrepancy_forward(const CamDiscrepancy& p) { FI_CALL(cam_discrepancy_forward(p)) }
void cam_discrepancy_backward(const CamDiscrepancy& p) { FI_CALL(cam_discrepancy_backward(p)) }
std::int64_t map_objective_scratch_bytes(const MapObjective& p) {
  FI_CALL(map_objective_scratch_bytes(p))
}
void map_objective(const MapObjective& p) { FI_CALL(map_objective(p)) }
std::int64_t batch_norm_act_scratch_bytes(const BatchNormAct& p) {
  FI_CALL(batch_norm_act_scratch_bytes(p))
}
void batch_norm_act_forward(const BatchNormAct& p) { FI_CALL(batch_norm_act_forward(p)) }
void batch_norm_act_backward(const BatchNormAct& p) { FI_CALL(batch_norm_act_backward(p)) }
void batch_norm_act_backward_backward(const BatchNormAct& p) {
  FI_CALL(batch_norm_act_backward_backward(p))
}
void activation(const ActivationPass& p) { FI_CALL(activation(p)) }
void activation_backward(const ActivationPass& p) { FI_CALL(activation_backward(p)) }
void activation_backward_backward(const ActivationPass& p) {
  FI_CALL(activation_backward_backward(p))
}
std::int64_t cross_entropy(const CrossEntropy& p) { FI_CALL(cross_entropy(p)) }
void cross_entropy_backward(const CrossEntropy& p) { FI_CALL(cross_entropy_backward(p)) }
void cross_entropy_backward_backward(const CrossEntropy& p) {
  FI_CALL(cross_entropy_backward_backward(p))
}
void max_pool2d(const MaxPool2d& p) { FI_CALL(max_pool2d(p)) }
std::int64_t max_pool2d_scratch_bytes(const MaxPool2d& p) { FI_CALL(max_pool2d_scratch_bytes(p)) }
void max_pool2d_backward(const MaxPool2d& p) { FI_CALL(max_pool2d_backward(p)) }
void max_pool2d_backward_backward(const MaxPool2d& p) { FI_CALL(max_pool2d_backward_backward(p)) }
std::int64_t norm_act_scratch_bytes(const NormAct& p) { FI_CALL(norm_act_scratch_bytes(p)) }
void norm_act_forward(const NormAct& p) { FI_CALL(norm_act_forward(p)) }
void norm_act_backward(const NormAct& p) { FI_CALL(norm_act_backward(p)) }
void norm_act_backward_backward(const NormAct& p) { FI_CALL(norm_act_backward_backward(p)) }

}  // namespace cpu
}  // namespace fastinterp
