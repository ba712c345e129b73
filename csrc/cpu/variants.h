// What every instruction-set variant of the CPU kernels exports, in a namespace of its name.
#pragma once

#include "../kernels.h"

#define FI_VARIANT(arch)                                               \
  namespace fastinterp {                                               \
  namespace cpu {                                                      \
  namespace arch {                                                     \
  void attack_step(const AttackStep& p);                               \
  std::int64_t conv2d_scratch_bytes(const Conv2d& p);                  \
  void conv2d(const Conv2d& p);                                        \
  std::int64_t kendall_tau_scratch_bytes(const KendallTau& p);         \
  void kendall_tau(const KendallTau& p);                               \
  std::int64_t cam_discrepancy_scratch_bytes(const CamDiscrepancy& p); \
  void cam_discrepancy_forward(const CamDiscrepancy& p);               \
  void cam_discrepancy_backward(const CamDiscrepancy& p);              \
  std::int64_t map_objective_scratch_bytes(const MapObjective& p);     \
  void map_objective(const MapObjective& p);                           \
  std::int64_t batch_norm_act_scratch_bytes(const BatchNormAct& p);    \
  void batch_norm_act_forward(const BatchNormAct& p);                  \
  void batch_norm_act_backward(const BatchNormAct& p);                 \
  void batch_norm_act_backward_backward(const BatchNormAct& p);        \
  void activation(const ActivationPass& p);                            \
  void activation_backward(const ActivationPass& p);                   \
  void activation_backward_backward(const ActivationPass& p);          \
  std::int64_t cross_entropy(const CrossEntropy& p);                   \
  void cross_entropy_backward(const CrossEntropy& p);                  \
  void cross_entropy_backward_backward(const CrossEntropy& p);         \
  void max_pool2d(const MaxPool2d& p);                                 \
  std::int64_t max_pool2d_scratch_bytes(const MaxPool2d& p);           \
  void max_pool2d_backward(const MaxPool2d& p);                        \
  void max_pool2d_backward_backward(const MaxPool2d& p);               \
  std::int64_t norm_act_scratch_bytes(const NormAct& p);               \
  void norm_act_forward(const NormAct& p);                             \
  void norm_act_backward(const NormAct& p);                            \
  void norm_act_backward_backward(const NormAct& p);                   \
  }                                                                    \
  }                                                                    \
  }
