#include "common.h"

namespace fastinterp {
namespace {

using Strides = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

FeatureStrides feature_strides(const Strides& s) {
  return {std::get<0>(s), std::get<1>(s), std::get<2>(s)};
}

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

void cpu_map_objective(int dtype, double cross_entropy, double discrepancy, std::int64_t examples,
                       std::int64_t classes, std::int64_t pixels, Address clean, Address maps,
                       Address bias, Address y, Address slope) {
  MapObjective p{};
  p.dtype = cpu_dtype(dtype);
  p.cross_entropy = cross_entropy;
  p.discrepancy = discrepancy;
  p.examples = examples;
  p.classes = classes;
  p.pixels = pixels;
  p.clean = pointer(clean);
  p.maps = pointer(maps);
  p.bias = pointer(bias);
  p.y = static_cast<const std::int64_t*>(pointer(y));
  p.slope = pointer(slope);
  py::gil_scoped_release release;
  const Scratch scratch = allocate(cpu::map_objective_scratch_bytes(p));
  p.scratch = scratch.get();
  cpu::map_objective(p);
}

}  // namespace

void bind_cam_discrepancy(py::module_& m) {
  m.def("cpu_cam_discrepancy_forward", &cpu_cam_discrepancy_forward);
  m.def("cpu_cam_discrepancy_backward", &cpu_cam_discrepancy_backward);
  m.def("cpu_map_objective", &cpu_map_objective);
}

}  // namespace fastinterp
