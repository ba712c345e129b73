// The whole boundary of the native core: plain structs of pointers, sizes and strides (in elements).
// No kernel allocates, and no CUDA kernel synchronises; scratch memory is the caller's.
#pragma once

#include <cstdint>

namespace fastinterp {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// "Accumulation type" below: double for f64 tensors, float for every other dtype.

enum class StepNorm : int { linf = 0, l2 = 1 };

// out = clip(project(x + step_size * direction(grad), origin, eps), clip_min, clip_max)
struct AttackStep {
  DType dtype;
  StepNorm norm;
  std::int64_t examples;  // N
  std::int64_t inner;     // elements of one example
  const void* x;          // (N, inner) dense, all four in the same element order
  const void* grad;       // (N, inner)
  const void* origin;     // (N, inner)
  void* out;              // (N, inner); may be x itself, so none of these is __restrict__
  const void* eps;        // accumulation type; one value, or N values when eps_stride == 1
  const void* step_size;  // likewise
  std::int64_t eps_stride;
  std::int64_t step_stride;
  double clip_min;  // -inf and +inf when there is no clip
  double clip_max;
  int threads;
};

enum class Activation : int {
  identity = 0,
  relu = 1,
  leaky_relu = 2,
  softplus = 3,
  silu = 4,
  gelu = 5
};

enum class MapNorm : int { l1 = 0, l2 = 1 };

// Feature maps are addressed as base[n * example + c * channel + p * pixel], p = h * width + w,
// which covers NCHW and channels_last without a copy.
struct FeatureStrides {
  std::int64_t example, channel, pixel;
};

// M[n,k,p] = sum_c head[k,c] (features[n,c,p] - features_adv[n,c,p]) is never stored whole: a tile
// of 64 pixels of one example at a time lives in a thread's scratch.
struct CamDiscrepancy {
  DType dtype;
  MapNorm norm;
  std::int64_t examples, channels, classes, pixels;  // N, C, K, P
  const void* features;                              // (N, C, P) dtype
  const void* features_adv;                          // (N, C, P) dtype
  FeatureStrides features_strides, features_adv_strides;
  const void* head;  // (K, C) accumulation type; null when the features are the class maps (K == C)
  int threads;

  // forward
  const void* class_weights;  // (N, K) accumulation type
  void* discrepancy;          // (N,)   accumulation type, sum_k class_weights * distances
  void* distances;            // (N, K) accumulation type; written forward, read backward for l2

  // backward
  const void* class_grad;     // (N, K) accumulation type, d loss / d distances
  void* grad_features_adv;    // (N, C, P) dtype, or null; the gradient of features is its negative
  FeatureStrides grad_strides;
  void* grad_head;            // (K, C) accumulation type, or null

  void* scratch;  // cam_discrepancy_scratch_bytes(p) bytes, 64-byte aligned
};

// The slope in `maps` of cross_entropy CE + discrepancy D, of class maps whose means are the logits and
// the weighted discrepancy of maps; formulas in cpu/map_objective.cpp.
struct MapObjective {
  DType dtype;  // f32 or f64
  double cross_entropy, discrepancy;       // weights
  std::int64_t examples, classes, pixels;  // N, K, P
  const void* clean;                       // (P, K, N), or null where D has no weight
  const void* maps;                        // (P, K, N)
  const void* bias;                        // (K,) or null
  const std::int64_t* y;                   // (N,)
  void* slope;                             // (P, K, N)
  void* scratch;  // map_objective_scratch_bytes(p) bytes, 64-byte aligned
};

// y = activation(weight (x - mean) rstd + bias + residual) and its first two derivatives; formulas in
// batch_norm.h. "N C P" is (N, C, P) dense, or (N, P, C) when channels_last. Vectors are of
// the accumulation type. A null input counts as zeros (weight: ones); a null output is not wanted.
struct BatchNormAct {
  DType dtype;
  Activation activation;
  double alpha;   // slope of leaky_relu, beta of softplus
  bool training;  // batch statistics
  double eps;
  std::int64_t examples, channels, pixels;  // N, C, P
  bool channels_last;
  int threads;

  const void* x;         // N C P dtype
  const void* residual;  // N C P dtype; backward: where the mask does not do
  const void* weight;    // (C,)
  const void* bias;      // (C,)
  void* mean;            // (C,) written forward, read backward
  void* rstd;            // (C,) likewise
  void* mask;            // one bit per element, rows or planes padded to bytes: pre-activation > 0

  // forward
  const void* running_mean;  // (C,) read when not training
  const void* running_var;   // (C,)
  void* y;                   // N C P dtype
  void* unbiased_var;        // (C,) written when training

  // backward
  const void* gy;      // N C P dtype
  const void* addend;  // N C P dtype, added to gx
  void* gx;            // N C P dtype
  void* gresidual;     // N C P dtype
  void* gweight;       // (C,)
  void* gbias;         // (C,)

  // backward of the backward: cotangents of its results, then gradients of gy, x, residual, weight, bias
  const void* v;         // N C P dtype, of gx
  const void* u;         // N C P dtype, of gresidual
  const void* a_weight;  // (C,) of gweight
  const void* a_bias;    // (C,) of gbias
  const void* sum_gx;    // (C,) gweight as the backward gave it; read when training
  const void* sum_g;     // (C,) gbias likewise
  void* ggy;             // N C P dtype
  void* gx2;             // N C P dtype
  void* gresidual2;      // N C P dtype, smooth activations only
  void* gweight2;        // (C,)
  void* gbias2;          // (C,)

  void* scratch;  // batch_norm_act_scratch_bytes(p) bytes, 64-byte aligned
};

// y = activation(weight xh + bias + residual), xh = (x - mean) rstd with the statistics of each
// example's G groups of channels, and its first two derivatives; formulas in cpu/norm_act.cpp. Layouts
// and null pointers as above.
struct NormAct {
  DType dtype;
  Activation activation;
  double alpha;
  double eps;
  std::int64_t examples, channels, pixels, groups;  // N, C, P, G
  bool channels_last;
  int threads;

  const void* x;         // N C P dtype
  const void* residual;  // N C P dtype
  const void* weight;    // (C,)
  const void* bias;      // (C,)
  void* mean;            // (N, G) written forward, read backward
  void* rstd;            // (N, G) likewise

  void* y;  // N C P dtype

  // backward
  const void* gy;      // N C P dtype
  const void* addend;  // N C P dtype, added to gx
  void* gx;            // N C P dtype
  void* gresidual;     // N C P dtype
  void* gweight;       // (C,)
  void* gbias;         // (C,)
  void* mean_h;        // (N, G) of weight times gresidual; written backward, read by the next
  void* mean_hx;       // (N, G) of that times xh; likewise

  // backward of the backward: cotangents of its results, then gradients of gy, x, residual, weight, bias
  const void* v;         // N C P dtype, of gx
  const void* u;         // N C P dtype, of gresidual
  const void* a_weight;  // (C,) of gweight
  const void* a_bias;    // (C,) of gbias
  void* ggy;             // N C P dtype
  void* gx2;             // N C P dtype
  void* gresidual2;      // N C P dtype, smooth activations only
  void* gweight2;        // (C,)
  void* gbias2;          // (C,)

  void* scratch;  // norm_act_scratch_bytes(p) bytes, 64-byte aligned
};

// Elementwise, with phi and its derivatives of activations.h:
//     forward             y = phi(z)
//     backward            gz = phi'(z) gy
//     backward_backward   ggy = phi'(z) v,  gz2 = phi''(z) gy v
struct ActivationPass {
  DType dtype;
  Activation kind;     // not identity, relu or leaky_relu
  double alpha;
  std::int64_t count;  // all tensors (count,) dtype, dense, in one order
  const void* z;
  const void* gy;
  const void* v;
  void* y;
  void* gz;
  void* ggy;  // or null
  void* gz2;  // or null
  int threads;
};

enum class Reduction : int { none = 0, sum = 1, mean = 2 };

// With p = softmax(z), t the target distribution (one-hot, mixed with 1/K by `smoothing`) and
// c[n] = grad[n] * scale, zero for an example whose target is ignore_index:
//     forward             losses[n] = -sum_k t log p;  total = scale * sum of them
//     backward            grad_logits = c (p - t)
//     backward_backward   grad_grad[n] = scale sum_k v (p - t),  grad_logits = c p (v - sum_k p v)
struct CrossEntropy {
  DType dtype;
  Reduction reduction;
  std::int64_t examples, classes;  // N, K
  double smoothing;
  std::int64_t ignore_index;
  const void* logits;          // (N, K) dtype
  const std::int64_t* target;  // (N,)
  // Accumulation type from here on, but for grad_logits and v.
  void* shift;  // (N, 2): the largest logit, and log sum exp(z - largest); p = exp(z - both)
  void* scale;  // (), 1 or, for mean, 1 / number of examples that count
  void* losses;        // (N,)
  void* total;         // (), or null without a reduction
  const void* grad;    // (N,) when grad_stride == 1, () when it is 0
  std::int64_t grad_stride;
  const void* v;      // (N, K) dtype, cotangent of the backward's grad_logits
  void* grad_grad;    // (N,), or null
  void* grad_logits;  // (N, K) dtype, or null in backward_backward
  int threads;
};

// An offset numbers the elements of a window, row by row, padding included; kNoOffset marks a
// window that lies in the padding altogether.
constexpr std::uint8_t kNoOffset = 255;

// Three passes over one geometry, each element (n, c, i, j) of `pooled` standing for a window of
// `map` that starts at row i * stride[0] - padding[0], column j * stride[1] - padding[1]:
//     forward            map -> pooled, offsets      the largest of the window and where it is
//     backward           pooled, offsets -> map      sums into where the largest was, zero elsewhere
//     backward_backward  map, offsets -> pooled      reads there; zero for kNoOffset
struct MaxPool2d {
  DType dtype;
  bool channels_last;                         // all three tensors NHWC, else NCHW; dense
  std::int64_t examples, channels;            // N, C
  std::int64_t height, width;                 // H, W
  std::int64_t pooled_height, pooled_width;   // h, w
  std::int64_t kernel[2], stride[2], padding[2], dilation[2];  // kernel[0] * kernel[1] <= 255
  void* map;              // (N, C, H, W) dtype
  void* pooled;           // (N, C, h, w) dtype
  std::uint8_t* offsets;  // (N, C, h, w)
  int threads;
  void* scratch;  // max_pool2d_scratch_bytes(p) bytes, which may be none, 64-byte aligned
};

// A convolution or, when `adjoint`, the input gradient of one; formulas in cpu/conv2d.cpp. Tensors are
// (H, W, C, N) dense, with at least 64 bytes of examples; out is none of the others. Kernel, stride,
// padding and dilation are those of the convolution either way; weight is read at
// o * weight_out + c * weight_in + taps * weight_tap.
struct Conv2d {
  DType dtype;  // f32 or f64
  bool adjoint;
  std::int64_t examples, in_channels, out_channels;
  std::int64_t in_size[2], out_size[2];
  std::int64_t kernel[2], stride[2], padding[2], dilation[2];
  std::int64_t weight_out, weight_in, weight_tap[2];
  const void* in;      // (h, w, in_channels, N)
  const void* weight;
  const void* bias;    // (out_channels,) or null
  const void* gate;    // (H, W, out_channels, N) or null: out is zero where it is zero or less
  bool relu;           // out is zero where it would be less
  void* out;           // (H, W, out_channels, N)
  int threads;
  void* scratch;       // conv2d_scratch_bytes(p) bytes, 64-byte aligned
};

// gweight[o, i, j, c] = sum_p gy[p, o] x[window(p)[i, j], c]
struct Conv2dWeightGrad {
  std::int64_t examples, channels, out_channels;                // N, C, O
  std::int64_t x_size[2], y_size[2];                            // H, W of x and of gy
  std::int64_t kernel[2], stride[2], padding[2], dilation[2];
  const void* gy;  // (N, H', W', O) bf16
  const void* x;   // (N, H, W, C) bf16
  void* gweight;   // (O, kh, kw, C) bf16
  int threads;
  void* scratch;   // conv2d_weight_grad_scratch_bytes(p) bytes, 64-byte aligned
};

// tau[n] = S / (sqrt(A) sqrt(B)) over the pairs i < j of row n: S = sum sign(a_i - a_j) sign(b_i - b_j),
// A and B = how many pairs differ in a, in b. NaN where a row holds a NaN or is constant.
struct KendallTau {
  DType dtype;                 // f32 or f64
  std::int64_t rows, columns;  // N, M
  const void* a;               // (N, M) dtype
  const void* b;               // (N, M) dtype
  double* tau;                 // (N,)
  int threads;
  void* scratch;  // kendall_tau_scratch_bytes(p) bytes, which may be none, 64-byte aligned
};

namespace cpu {
const char* instruction_set();  // the variant chosen at run time: "baseline", "avx2" or "avx512"
void attack_step(const AttackStep& p);
std::int64_t conv2d_scratch_bytes(const Conv2d& p);
void conv2d(const Conv2d& p);
std::int64_t cam_discrepancy_scratch_bytes(const CamDiscrepancy& p);
void cam_discrepancy_forward(const CamDiscrepancy& p);
void cam_discrepancy_backward(const CamDiscrepancy& p);
std::int64_t map_objective_scratch_bytes(const MapObjective& p);
void map_objective(const MapObjective& p);
std::int64_t batch_norm_act_scratch_bytes(const BatchNormAct& p);
void batch_norm_act_forward(const BatchNormAct& p);
void batch_norm_act_backward(const BatchNormAct& p);
void batch_norm_act_backward_backward(const BatchNormAct& p);
std::int64_t norm_act_scratch_bytes(const NormAct& p);
void norm_act_forward(const NormAct& p);
void norm_act_backward(const NormAct& p);
void norm_act_backward_backward(const NormAct& p);
void activation(const ActivationPass& p);
void activation_backward(const ActivationPass& p);
void activation_backward_backward(const ActivationPass& p);
// The first example whose target is neither a class nor ignore_index, or -1.
std::int64_t cross_entropy(const CrossEntropy& p);
void cross_entropy_backward(const CrossEntropy& p);
void cross_entropy_backward_backward(const CrossEntropy& p);
void max_pool2d(const MaxPool2d& p);
std::int64_t max_pool2d_scratch_bytes(const MaxPool2d& p);
void max_pool2d_backward(const MaxPool2d& p);
void max_pool2d_backward_backward(const MaxPool2d& p);

std::int64_t kendall_tau_scratch_bytes(const KendallTau& p);
void kendall_tau(const KendallTau& p);

// Whether this build, processor and kernel have AMX tiles for bfloat16; these two need them.
bool amx_bf16();
std::int64_t conv2d_weight_grad_scratch_bytes(const Conv2dWeightGrad& p);
void conv2d_weight_grad(const Conv2dWeightGrad& p);
}  // namespace cpu

#ifdef FASTINTERP_WITH_CUDA
namespace cuda {
// Each returns a cudaError_t as int; 0 is success.
int attack_step(const AttackStep& p, void* stream);
std::int64_t batch_norm_act_scratch_bytes(const BatchNormAct& p);
int batch_norm_act_forward(const BatchNormAct& p, void* stream);
int batch_norm_act_backward(const BatchNormAct& p, void* stream);
int batch_norm_act_backward_backward(const BatchNormAct& p, void* stream);
std::int64_t kendall_tau_scratch_bytes(const KendallTau& p);
int kendall_tau(const KendallTau& p, void* stream);
const char* error_string(int code);
}  // namespace cuda
#endif

}  // namespace fastinterp
