// y = phi(gamma xh + beta + residual), xh = (x - mean) rstd, and its first two derivatives.
//
// With g = phi'(z) gy, s1 = sum g, s2 = sum g xh, M elements a channel (sums are per channel):
//     gx        = gamma rstd (g - s1/M - xh s2/M)            batch statistics
//               = gamma rstd g                               running statistics
//     gresidual = g      ggamma = s2      gbeta = s1
// With cotangents v of gx, u of gresidual, a_gamma and a_beta, w = phi''(z) gy:
//     q    = gamma rstd (v - Sv/M - xh Svx/M) + u + a_gamma xh + a_beta
//     ggy  = phi'(z) q       h = w q (cotangent of z)       gresidual2 = h
//     gx2  = -(gamma rstd^2/M) [a xh + s2 (v - Sv/M - xh Svx/M) + Svx (g - s1/M - xh s2/M)]
//            + rstd a_gamma (g - s1/M - xh s2/M) + gamma rstd (h - H1/M - xh H2/M)
//     a    = Svg - Sv s1/M - Svx s2/M      ggamma2 = rstd a + H2      gbeta2 = H1
// where Sv = sum v, Svx = sum v xh, Svg = sum v g, H1 = sum h, H2 = sum h xh. With running statistics
// only a = Svg, rstd a_gamma g and gamma rstd h remain. h is linear in what the sums give, so one
// pass collects them all.
#include "../activations.h"
#include "strips.h"

namespace fastinterp {
namespace cpu {
namespace FI_ARCH {
namespace {

// Values per channel, in the order of the scratch.
enum Value { kMean, kRstd, kScale, kBias, kAffine };  // scale = gamma rstd; kAffine: how many so far
enum { kConst = kAffine, kX, kBackward };                         // gx = const + x xh + scale g
enum { kQConst = kAffine, kQX, kGConst, kGX, kGV, kGG, kSecond };  // q and gx2

template <typename T, Activation K, bool Masked>
struct Kernel {
  using A = acc_t<T>;
  const BatchNormAct& p;
  const Geometry g;
  const A alpha;
  const std::int64_t lanes;
  A* values;        // [kSecond][lanes]
  double* partial;  // partial_size(g, sums)

  explicit Kernel(const BatchNormAct& params)
      : p(params),
        g{p.examples, p.channels, p.pixels, p.channels_last, p.threads},
        alpha(static_cast<A>(p.alpha)),
        lanes(g.lanes()),
        values(static_cast<A*>(p.scratch)),
        partial(reinterpret_cast<double*>(values + (kSecond * lanes + 7) / 8 * 8)) {}

  static std::int64_t scratch_bytes(const BatchNormAct& params) {
    const Kernel k(params);
    return (kSecond * k.lanes + 8) * sizeof(A) + partial_size(k.g, kMaxSums) * sizeof(double);
  }
  static constexpr int kMaxSums = 10;

  static const A* vector(const void* data) { return static_cast<const A*>(data); }
  static A at(const void* data, std::int64_t c, A otherwise) {
    return data == nullptr ? otherwise : vector(data)[c];
  }
  void set(int value, std::int64_t c, double v) const {
    for (std::int64_t lane = c; lane < lanes; lane += p.channels) {
      values[value * lanes + lane] = static_cast<A>(v);
    }
  }
  // A null pointer stands for zeros: every row is then the same strip of them.
  static Source<T> source(const void* data) {
    alignas(64) static const T zeros[kLanes] = {};
    return {data == nullptr ? zeros : static_cast<const T*>(data), data != nullptr};
  }

  void set_affine(std::int64_t c, A mean, A rstd) const {
    set(kMean, c, mean);
    set(kRstd, c, rstd);
    set(kScale, c, at(p.weight, c, A(1)) * rstd);
    set(kBias, c, at(p.bias, c, A(0)));
  }

  // ---- forward

  // Mean of a few elements spread over the channel, which the sums are taken relative to.
  double pivot(std::int64_t c) const {
    const std::int64_t count = g.count(), samples = count < 32 ? count : 32;
    const T* x = static_cast<const T*>(p.x);
    double sum = 0;
    for (std::int64_t i = 0; i < samples; ++i) {
      const std::int64_t m = i * count / samples;
      const std::int64_t row = m / p.pixels * p.channels;
      sum += load(x + (p.channels_last ? m * p.channels + c : (row + c) * p.pixels + m % p.pixels));
    }
    return samples > 0 ? sum / samples : 0;
  }

  void forward() const {
    if (p.training) {
      for (std::int64_t c = 0; c < p.channels; ++c) set(kMean, c, pivot(c));
    }
    const Source<T> x = source(p.x), residual = source(p.residual);
    T* y = static_cast<T*>(p.y);
    std::uint8_t* mask = static_cast<std::uint8_t*>(p.mask);
    const auto sum = [&](std::int64_t c, double* out, std::int64_t stride, auto walk) {
      const Lanes<A, 1> lane(g, values, c);
      walk([&](const Strip& strip) {
        sum_rows<A, 2>(strip, out, stride, [&](std::int64_t r, auto width, A(&sums)[2][kLanes]) {
          const T* xr = x.row(strip, r);
#pragma omp simd
          for (std::int64_t j = 0; j < width; ++j) {
            const A d = load(xr + j) - lane.value[kMean][j];
            sums[0][j] += d;
            sums[1][j] += d * d;
          }
        });
      });
    };
    const auto combine = [&](std::int64_t c, const double* total) {
      double mean, var;
      if (p.training) {
        const double shift = total[0] / g.count();
        mean = values[kMean * lanes + c] + shift;
        var = total[1] / g.count() - shift * shift;
        if (var < 0) var = 0;
        static_cast<A*>(p.var)[c] = static_cast<A>(var);
      } else {
        mean = vector(p.running_mean)[c];
        var = vector(p.running_var)[c];
      }
      const A rstd = A(1) / root(static_cast<A>(var + p.eps));
      static_cast<A*>(p.mean)[c] = static_cast<A>(mean);
      static_cast<A*>(p.rstd)[c] = rstd;
      set_affine(c, static_cast<A>(mean), rstd);
    };
    const auto apply = [&](std::int64_t c, auto walk) {
      const Lanes<A, kAffine> lane(g, values, c);
      walk([&](const Strip& strip) {
        each_row(strip, 0, strip.rows, [&](std::int64_t r, auto width) {
          const T *xr = x.row(strip, r), *er = residual.row(strip, r);
          T* yr = y + strip.first + r * strip.row;
          std::uint64_t bits = 0;
#pragma omp simd reduction(| : bits)
          for (std::int64_t j = 0; j < width; ++j) {
            const A z = (load(xr + j) - lane.value[kMean][j]) * lane.value[kScale][j] +
                        lane.value[kBias][j] + load(er + j);
            if (Masked) bits |= static_cast<std::uint64_t>(z > 0) << j;
            store(yr + j, activation_value<K>(z, alpha));
          }
          if (Masked) store_bits(mask + strip.bits + r * strip.bits_row, width, bits);
        });
      });
    };
    two_passes<2>(g, partial, p.training, true, sum, combine, apply);
  }

  // ---- both backward passes

  // phi' of a row and, for the smooth activations, phi''.
  template <typename Lane, typename Width>
  void slopes(const Strip& strip, std::int64_t r, Width width, const Lane& lane, const T* xr,
              const T* er, A* slope, A* curvature) const {
    if (Masked) {
      const std::uint64_t bits =
          load_bits(static_cast<const std::uint8_t*>(p.mask) + strip.bits + r * strip.bits_row, width);
#pragma omp simd
      for (std::int64_t j = 0; j < width; ++j) {
        slope[j] = (bits >> j) & 1 ? A(1) : activation_slope<K>(A(-1), alpha);
      }
      return;
    }
#pragma omp simd
    for (std::int64_t j = 0; j < width; ++j) {
      const A z = (load(xr + j) - lane.value[kMean][j]) * lane.value[kScale][j] +
                  lane.value[kBias][j] + load(er + j);
      slope[j] = activation_slope<K>(z, alpha);
      if constexpr (kSmooth) curvature[j] = activation_curvature<K>(z, alpha);
    }
  }
  static constexpr bool kSmooth =
      K == Activation::softplus || K == Activation::silu || K == Activation::gelu;

  void load_affine() const {
    for (std::int64_t c = 0; c < p.channels; ++c) {
      set_affine(c, vector(p.mean)[c], vector(p.rstd)[c]);
    }
  }

  void backward() const {
    load_affine();
    const Source<T> x = source(p.x), residual = source(p.residual), gy = source(p.gy);
    T *gx = static_cast<T*>(p.gx), *gresidual = static_cast<T*>(p.gresidual);
    const auto sum = [&](std::int64_t c, double* out, std::int64_t stride, auto walk) {
      const Lanes<A, kAffine> lane(g, values, c);
      walk([&](const Strip& strip) {
        sum_rows<A, 2>(strip, out, stride, [&](std::int64_t r, auto width, A(&sums)[2][kLanes]) {
          const T *xr = x.row(strip, r), *gr = gy.row(strip, r);
          alignas(64) A slope[kLanes], curvature[kLanes];
          slopes(strip, r, width, lane, xr, residual.row(strip, r), slope, curvature);
#pragma omp simd
          for (std::int64_t j = 0; j < width; ++j) {
            const A xh = (load(xr + j) - lane.value[kMean][j]) * lane.value[kRstd][j];
            const A gj = slope[j] * load(gr + j);
            sums[0][j] += gj;
            sums[1][j] += gj * xh;
          }
        });
      });
    };
    const auto combine = [&](std::int64_t c, const double* total) {
      const double scale = p.training ? values[kScale * lanes + c] / double(g.count()) : 0;
      set(kConst, c, -scale * total[0]);
      set(kX, c, -scale * total[1]);
      if (p.gbias != nullptr) static_cast<A*>(p.gbias)[c] = static_cast<A>(total[0]);
      if (p.gweight != nullptr) static_cast<A*>(p.gweight)[c] = static_cast<A>(total[1]);
    };
    const auto apply = [&](std::int64_t c, auto walk) {
      const Lanes<A, kBackward> lane(g, values, c);
      walk([&](const Strip& strip) {
        each_row(strip, 0, strip.rows, [&](std::int64_t r, auto width) {
          const T *xr = x.row(strip, r), *gr = gy.row(strip, r);
          alignas(64) A slope[kLanes], curvature[kLanes];
          slopes(strip, r, width, lane, xr, residual.row(strip, r), slope, curvature);
#pragma omp simd
          for (std::int64_t j = 0; j < width; ++j) slope[j] *= load(gr + j);
          if (gresidual != nullptr) {
            T* out = gresidual + strip.first + r * strip.row;
#pragma omp simd
            for (std::int64_t j = 0; j < width; ++j) store(out + j, slope[j]);
          }
          if (gx != nullptr) {
            T* out = gx + strip.first + r * strip.row;
#pragma omp simd
            for (std::int64_t j = 0; j < width; ++j) {
              const A xh = (load(xr + j) - lane.value[kMean][j]) * lane.value[kRstd][j];
              store(out + j, lane.value[kScale][j] * slope[j] + lane.value[kX][j] * xh +
                                 lane.value[kConst][j]);
            }
          }
        });
      });
    };
    const bool need_sums = p.training ? gx != nullptr || p.gbias != nullptr : p.gbias != nullptr;
    two_passes<2>(g, partial, need_sums, gx != nullptr || gresidual != nullptr, sum, combine, apply);
  }

  // sums of the second order: v, v xh, v g; then with w = phi'' gy the seven that make H1 and H2
  enum { kSv, kSvx, kSvg, kSw, kSwx, kSwxx, kSvw, kSvwx, kSuw, kSuwx };
  static constexpr int kSums = kSmooth ? kMaxSums : 3;

  void backward_backward() const {
    load_affine();
    const Source<T> x = source(p.x), residual = source(p.residual), gy = source(p.gy),
                    v = source(p.v), u = source(p.u);
    T *ggy = static_cast<T*>(p.ggy), *gx2 = static_cast<T*>(p.gx2),
      *gresidual2 = static_cast<T*>(p.gresidual2);
    const auto sum = [&](std::int64_t c, double* out, std::int64_t stride, auto walk) {
      const Lanes<A, kAffine> lane(g, values, c);
      walk([&](const Strip& strip) {
        sum_rows<A, kSums>(
            strip, out, stride, [&](std::int64_t r, auto width, A(&sums)[kSums][kLanes]) {
              const T *xr = x.row(strip, r), *gr = gy.row(strip, r), *vr = v.row(strip, r),
                      *ur = u.row(strip, r);
              alignas(64) A slope[kLanes], curvature[kLanes];
              slopes(strip, r, width, lane, xr, residual.row(strip, r), slope, curvature);
#pragma omp simd
              for (std::int64_t j = 0; j < width; ++j) {
                const A xh = (load(xr + j) - lane.value[kMean][j]) * lane.value[kRstd][j];
                const A gyj = load(gr + j), vj = load(vr + j);
                sums[kSv][j] += vj;
                sums[kSvx][j] += vj * xh;
                sums[kSvg][j] += vj * slope[j] * gyj;
                if constexpr (kSmooth) {
                  const A w = curvature[j] * gyj, vw = vj * w, uw = load(ur + j) * w;
                  sums[kSw][j] += w;
                  sums[kSwx][j] += w * xh;
                  sums[kSwxx][j] += w * xh * xh;
                  sums[kSvw][j] += vw;
                  sums[kSvwx][j] += vw * xh;
                  sums[kSuw][j] += uw;
                  sums[kSuwx][j] += uw * xh;
                }
              }
            });
      });
    };
    const auto combine = [&](std::int64_t c, const double* total) {
      const double rstd = values[kRstd * lanes + c], scale = values[kScale * lanes + c];
      const double a_weight = at(p.a_weight, c, A(0)), a_bias = at(p.a_bias, c, A(0));
      const double share = p.training ? 1.0 / g.count() : 0;  // 1/M, or no batch statistics
      const double mean_v = total[kSv] * share, mean_vx = total[kSvx] * share;
      const double mean_g = at(p.sum_g, c, A(0)) * share, mean_gx = at(p.sum_gx, c, A(0)) * share;
      const double q_const = a_bias - scale * mean_v, q_x = a_weight - scale * mean_vx;
      double h1 = 0, h2 = 0;
      if constexpr (kSmooth) {
        h1 = scale * total[kSvw] + total[kSuw] + q_x * total[kSwx] + q_const * total[kSw];
        h2 = scale * total[kSvwx] + total[kSuwx] + q_x * total[kSwxx] + q_const * total[kSwx];
      }
      const double a = total[kSvg] - total[kSv] * mean_g - total[kSvx] * mean_gx;
      if (p.gweight2 != nullptr) static_cast<A*>(p.gweight2)[c] = static_cast<A>(rstd * a + h2);
      if (p.gbias2 != nullptr) static_cast<A*>(p.gbias2)[c] = static_cast<A>(h1);
      // gx2 = const + x xh + v v + g g + scale h
      const double by_v = -scale * rstd * mean_gx, by_g = rstd * (a_weight - scale * mean_vx);
      set(kQConst, c, q_const);
      set(kQX, c, q_x);
      set(kGV, c, by_v);
      set(kGG, c, by_g);
      set(kGConst, c, -by_v * mean_v - by_g * mean_g - scale * h1 * share);
      set(kGX, c, -scale * rstd * a * share - by_v * mean_vx - by_g * mean_gx - scale * h2 * share);
    };
    const auto apply = [&](std::int64_t c, auto walk) {
      const Lanes<A, kSecond> lane(g, values, c);
      walk([&](const Strip& strip) {
        each_row(strip, 0, strip.rows, [&](std::int64_t r, auto width) {
          const T *xr = x.row(strip, r), *gr = gy.row(strip, r), *vr = v.row(strip, r),
                  *ur = u.row(strip, r);
          const std::int64_t at = strip.first + r * strip.row;
          alignas(64) A slope[kLanes], curvature[kLanes], q[kLanes], xh[kLanes];
          slopes(strip, r, width, lane, xr, residual.row(strip, r), slope, curvature);
#pragma omp simd
          for (std::int64_t j = 0; j < width; ++j) {
            xh[j] = (load(xr + j) - lane.value[kMean][j]) * lane.value[kRstd][j];
            q[j] = lane.value[kScale][j] * load(vr + j) + load(ur + j) +
                   lane.value[kQX][j] * xh[j] + lane.value[kQConst][j];
          }
          if (ggy != nullptr) {
#pragma omp simd
            for (std::int64_t j = 0; j < width; ++j) store(ggy + at + j, slope[j] * q[j]);
          }
          if constexpr (kSmooth) {
            if (gresidual2 != nullptr) {
#pragma omp simd
              for (std::int64_t j = 0; j < width; ++j) {
                store(gresidual2 + at + j, curvature[j] * load(gr + j) * q[j]);
              }
            }
          }
          if (gx2 != nullptr) {
#pragma omp simd
            for (std::int64_t j = 0; j < width; ++j) {
              const A gyj = load(gr + j);
              A out = lane.value[kGConst][j] + lane.value[kGX][j] * xh[j] +
                      lane.value[kGV][j] * load(vr + j) + lane.value[kGG][j] * slope[j] * gyj;
              if constexpr (kSmooth) out += lane.value[kScale][j] * curvature[j] * gyj * q[j];
              store(gx2 + at + j, out);
            }
          }
        });
      });
    };
    const bool need_sums = p.training || p.gweight2 != nullptr || p.gbias2 != nullptr;
    const bool need_apply = ggy != nullptr || gx2 != nullptr || gresidual2 != nullptr;
    two_passes<kSums>(g, partial, need_sums, need_apply, sum, combine, apply);
  }
};

// Calls f(Kernel) with the element type, the activation and whether the mask is at hand.
template <typename F>
void with_kernel(const BatchNormAct& p, F f) {
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    switch (p.activation) {
      case Activation::identity:
        return f(Kernel<T, Activation::identity, false>(p));
      case Activation::relu:
        if (p.mask == nullptr) return f(Kernel<T, Activation::relu, false>(p));
        return f(Kernel<T, Activation::relu, true>(p));
      case Activation::leaky_relu:
        if (p.mask == nullptr) return f(Kernel<T, Activation::leaky_relu, false>(p));
        return f(Kernel<T, Activation::leaky_relu, true>(p));
      case Activation::softplus:
        return f(Kernel<T, Activation::softplus, false>(p));
      case Activation::silu:
        return f(Kernel<T, Activation::silu, false>(p));
      case Activation::gelu:
        return f(Kernel<T, Activation::gelu, false>(p));
    }
  });
}

}  // namespace

std::int64_t batch_norm_act_scratch_bytes(const BatchNormAct& p) {
  std::int64_t bytes = 0;
  with_kernel(p, [&](auto kernel) { bytes = decltype(kernel)::scratch_bytes(p); });
  return bytes;
}
void batch_norm_act_forward(const BatchNormAct& p) {
  with_kernel(p, [](auto kernel) { kernel.forward(); });
}
void batch_norm_act_backward(const BatchNormAct& p) {
  with_kernel(p, [](auto kernel) { kernel.backward(); });
}
void batch_norm_act_backward_backward(const BatchNormAct& p) {
  with_kernel(p, [](auto kernel) { kernel.backward_backward(); });
}

}  // namespace FI_ARCH
}  // namespace cpu
}  // namespace fastinterp
