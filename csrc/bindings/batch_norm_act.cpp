#include "common.h"

namespace fastinterp {
namespace {

// dtype, activation, alpha, training, eps, N, C, P, channels_last, threads
using Header = std::tuple<int, int, double, bool, double, std::int64_t, std::int64_t, std::int64_t,
                          bool, int>;

BatchNormAct batch_norm_act_params(const Header& h, Address x, Address residual, Address weight,
                                   Address bias, Address mean, Address rstd, Address mask) {
  BatchNormAct p{};
  p.dtype = static_cast<DType>(std::get<0>(h));
  p.activation = static_cast<Activation>(std::get<1>(h));
  p.alpha = std::get<2>(h);
  p.training = std::get<3>(h);
  p.eps = std::get<4>(h);
  p.examples = std::get<5>(h);
  p.channels = std::get<6>(h);
  p.pixels = std::get<7>(h);
  p.channels_last = std::get<8>(h);
  p.threads = std::get<9>(h);
  p.x = pointer(x);
  p.residual = pointer(residual);
  p.weight = pointer(weight);
  p.bias = pointer(bias);
  p.mean = pointer(mean);
  p.rstd = pointer(rstd);
  p.mask = pointer(mask);
  return p;
}

BatchNormAct forward(const Header& h, Address x, Address residual, Address weight, Address bias,
             Address mean, Address rstd, Address mask, Address running_mean, Address running_var,
             Address y, Address unbiased_var) {
  BatchNormAct p = batch_norm_act_params(h, x, residual, weight, bias, mean, rstd, mask);
  p.running_mean = pointer(running_mean);
  p.running_var = pointer(running_var);
  p.y = pointer(y);
  p.unbiased_var = pointer(unbiased_var);
  return p;
}

BatchNormAct backward(const Header& h, Address x, Address residual, Address weight, Address bias,
                      Address mean, Address rstd, Address mask, Address gy, Address addend, Address gx,
              Address gresidual, Address gweight, Address gbias) {
  BatchNormAct p = batch_norm_act_params(h, x, residual, weight, bias, mean, rstd, mask);
  p.gy = pointer(gy);
  p.addend = pointer(addend);
  p.gx = pointer(gx);
  p.gresidual = pointer(gresidual);
  p.gweight = pointer(gweight);
  p.gbias = pointer(gbias);
  return p;
}

BatchNormAct backward_backward(const Header& h, Address x, Address residual, Address weight, Address bias,
                       Address mean, Address rstd, Address mask, Address gy, Address v, Address u,
                       Address a_weight, Address a_bias, Address sum_gx, Address sum_g, Address ggy,
                       Address gx2, Address gresidual2, Address gweight2, Address gbias2) {
  BatchNormAct p = batch_norm_act_params(h, x, residual, weight, bias, mean, rstd, mask);
  p.gy = pointer(gy);
  p.v = pointer(v);
  p.u = pointer(u);
  p.a_weight = pointer(a_weight);
  p.a_bias = pointer(a_bias);
  p.sum_gx = pointer(sum_gx);
  p.sum_g = pointer(sum_g);
  p.ggy = pointer(ggy);
  p.gx2 = pointer(gx2);
  p.gresidual2 = pointer(gresidual2);
  p.gweight2 = pointer(gweight2);
  p.gbias2 = pointer(gbias2);
  return p;
}

// Binds cpu_NAME, whose arguments are those of `params`.
template <typename... Args>
void define_cpu(py::module_& m, const char* name, BatchNormAct (*params)(Args...),
                void (*kernel)(const BatchNormAct&)) {
  m.def(name, [=](Args... args) {
    BatchNormAct p = params(args...);
    p.dtype = cpu_dtype(static_cast<int>(p.dtype));
    py::gil_scoped_release release;
    const Scratch scratch = allocate(cpu::batch_norm_act_scratch_bytes(p));
    p.scratch = scratch.get();
    kernel(p);
  });
}

#ifdef FASTINTERP_WITH_CUDA
// Binds cuda_NAME: the same, the scratch memory and the stream.
template <typename... Args>
void define_cuda(py::module_& m, const char* name, BatchNormAct (*params)(Args...),
                 int (*kernel)(const BatchNormAct&, void*)) {
  m.def(name, [=](Args... args, Address scratch, Address stream) {
    BatchNormAct p = params(args...);
    p.scratch = pointer(scratch);
    launch("batch_norm_act", p, kernel, stream);
  });
}

std::int64_t cuda_scratch_bytes(const Header& h) {
  return cuda::batch_norm_act_scratch_bytes(batch_norm_act_params(h, 0, 0, 0, 0, 0, 0, 0));
}
#endif

}  // namespace

void bind_batch_norm_act(py::module_& m) {
  define_cpu(m, "cpu_batch_norm_act_forward", forward, cpu::batch_norm_act_forward);
  define_cpu(m, "cpu_batch_norm_act_backward", backward, cpu::batch_norm_act_backward);
  define_cpu(m, "cpu_batch_norm_act_backward_backward", backward_backward,
             cpu::batch_norm_act_backward_backward);
#ifdef FASTINTERP_WITH_CUDA
  m.def("cuda_batch_norm_act_scratch_bytes", &cuda_scratch_bytes);
  define_cuda(m, "cuda_batch_norm_act_forward", forward, cuda::batch_norm_act_forward);
  define_cuda(m, "cuda_batch_norm_act_backward", backward, cuda::batch_norm_act_backward);
  define_cuda(m, "cuda_batch_norm_act_backward_backward", backward_backward,
              cuda::batch_norm_act_backward_backward);
#endif
}

}  // namespace fastinterp
