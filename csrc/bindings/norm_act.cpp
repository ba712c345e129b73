#include "common.h"

namespace fastinterp {
namespace {

// dtype, activation, alpha, eps, N, C, P, G, channels_last, threads
using Header = std::tuple<int, int, double, double, std::int64_t, std::int64_t, std::int64_t,
                          std::int64_t, bool, int>;

NormAct norm_act_params(const Header& h, Address x, Address residual, Address weight, Address bias,
                        Address mean, Address rstd) {
  NormAct p{};
  p.dtype = cpu_dtype(std::get<0>(h));
  p.activation = static_cast<Activation>(std::get<1>(h));
  p.alpha = std::get<2>(h);
  p.eps = std::get<3>(h);
  p.examples = std::get<4>(h);
  p.channels = std::get<5>(h);
  p.pixels = std::get<6>(h);
  p.groups = std::get<7>(h);
  p.channels_last = std::get<8>(h);
  p.threads = std::get<9>(h);
  p.x = pointer(x);
  p.residual = pointer(residual);
  p.weight = pointer(weight);
  p.bias = pointer(bias);
  p.mean = pointer(mean);
  p.rstd = pointer(rstd);
  return p;
}

void run(NormAct& p, void (*kernel)(const NormAct&)) {
  py::gil_scoped_release release;
  const Scratch scratch = allocate(cpu::norm_act_scratch_bytes(p));
  p.scratch = scratch.get();
  kernel(p);
}

void forward(const Header& h, Address x, Address residual, Address weight, Address bias,
             Address mean, Address rstd, Address y) {
  NormAct p = norm_act_params(h, x, residual, weight, bias, mean, rstd);
  p.y = pointer(y);
  run(p, &cpu::norm_act_forward);
}

void backward(const Header& h, Address x, Address residual, Address weight, Address bias,
              Address mean, Address rstd, Address gy, Address addend, Address gx, Address gresidual,
              Address gweight, Address gbias, Address mean_h, Address mean_hx) {
  NormAct p = norm_act_params(h, x, residual, weight, bias, mean, rstd);
  p.gy = pointer(gy);
  p.addend = pointer(addend);
  p.gx = pointer(gx);
  p.gresidual = pointer(gresidual);
  p.gweight = pointer(gweight);
  p.gbias = pointer(gbias);
  p.mean_h = pointer(mean_h);
  p.mean_hx = pointer(mean_hx);
  run(p, &cpu::norm_act_backward);
}

void backward_backward(const Header& h, Address x, Address residual, Address weight, Address bias,
                       Address mean, Address rstd, Address gy, Address v, Address u,
                       Address a_weight, Address a_bias, Address mean_h, Address mean_hx,
                       Address ggy, Address gx2, Address gresidual2, Address gweight2,
                       Address gbias2) {
  NormAct p = norm_act_params(h, x, residual, weight, bias, mean, rstd);
  p.gy = pointer(gy);
  p.v = pointer(v);
  p.u = pointer(u);
  p.a_weight = pointer(a_weight);
  p.a_bias = pointer(a_bias);
  p.mean_h = pointer(mean_h);
  p.mean_hx = pointer(mean_hx);
  p.ggy = pointer(ggy);
  p.gx2 = pointer(gx2);
  p.gresidual2 = pointer(gresidual2);
  p.gweight2 = pointer(gweight2);
  p.gbias2 = pointer(gbias2);
  run(p, &cpu::norm_act_backward_backward);
}

}  // namespace

void bind_norm_act(py::module_& m) {
  m.def("cpu_norm_act_forward", &forward);
  m.def("cpu_norm_act_backward", &backward);
  m.def("cpu_norm_act_backward_backward", &backward_backward);
}

}  // namespace fastinterp
