// The formulas are in ../batch_norm.h; one pass sums, another applies what follows from the sums.
#include "../batch_norm.h"
#include "strips.h"

namespace fastinterp {
namespace cpu {
namespace FI_ARCH {
namespace {

// Values per channel, in the order of the scratch.
enum Value { kMean, kRstd, kScale, kBias, kAffine };  // scale = gamma rstd; kAffine: how many so far
enum { kConst = kAffine, kX, kBackward };                         // gx = const + x (x - mean) + scale g
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
  static constexpr int kMaxSums = kSumsSmooth;

  // 1/M with batch statistics; an empty batch has sums of zero, and they stay zero.
  double share() const { return p.training ? 1.0 / (g.count() > 0 ? g.count() : 1) : 0; }

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

  // ---- elements: X is a vector of them, or one

  using Function = Phi<T, K>;
  static constexpr bool kSmooth = Function::smooth;

  // What an element is made of, at row r and lanes from j on of a strip.
  template <int S>
  struct Elements {
    const Kernel& k;
    const Lanes<A, S>& lane;
    const Rows<T> x, residual, gy, v, u;
    const std::uint8_t* bits;
    const std::int64_t bits_row;

    Elements(const Kernel& kernel, const Lanes<A, S>& lanes, const Strip& s)
        : k(kernel),
          lane(lanes),
          x(source(k.p.x).in(s)),
          residual(source(k.p.residual).in(s)),
          gy(source(k.p.gy).in(s)),
          v(source(k.p.v).in(s)),
          u(source(k.p.u).in(s)),
          bits(Masked ? static_cast<const std::uint8_t*>(k.p.mask) + s.bits : nullptr),
          bits_row(s.bits_row) {}

    template <typename P>
    typename P::X of(int value, std::int64_t j) const {
      return P::values(lane.value[value] + j);
    }
    template <typename P>
    typename P::X centred(std::int64_t r, std::int64_t j) const {
      return P::load(x.at(r, j)) - of<P>(kMean, j);
    }
    template <typename P>
    typename P::X normalised(std::int64_t r, std::int64_t j) const {
      return centred<P>(r, j) * of<P>(kRstd, j);
    }
    // Not for a piecewise linear phi with a residual, which has the mask instead.
    template <typename P>
    typename P::X pre_activation(std::int64_t r, std::int64_t j) const {
      const auto z = centred<P>(r, j) * of<P>(kScale, j) + of<P>(kBias, j);
      if constexpr (kSmooth) return z + P::load(residual.at(r, j));
      return z;
    }
    // phi'(z), as the sign of z where that is all there is to it.
    template <typename P>
    auto slope(std::int64_t r, std::int64_t j) const {
      if constexpr (Masked) {
        return P::load_bits(bits + r * bits_row + j / 8, j);
      } else {
        return Function::template slope<P>(pre_activation<P>(r, j), k.alpha);
      }
    }
    template <typename P, typename Slope>
    typename P::X times(Slope slope, typename P::X v) const {
      return Function::template times<P>(slope, v, k.alpha);
    }
    template <typename P>
    typename P::X curvature(std::int64_t r, std::int64_t j) const {
      return Function::template curvature<P>(pre_activation<P>(r, j), k.alpha);
    }
  };

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
    T* y = static_cast<T*>(p.y);
    std::uint8_t* mask = static_cast<std::uint8_t*>(p.mask);
    const auto sum = [&](const Strips& strips, double* out, std::int64_t stride) FI_NOINLINE {
      const Lanes<A, 1> lane(g, values, strips.c);
      strips.each([&](const Strip& strip) {
        const Rows<T> x = source(p.x).in(strip);
        sum_rows<T, 2>(strip, out, stride,
                       [&](auto pack, std::int64_t r, std::int64_t j, auto* sum) {
                         using P = decltype(pack);
                         const auto d = P::load(x.at(r, j)) - P::values(lane.value[kMean] + j);
                         sum[0] += d;
                         sum[1] += d * d;
                       });
      });
    };
    const auto combine = [&](std::int64_t c, const double* total) {
      NormStatistics of{};
      if (p.training) {
        of = norm_statistics(values[kMean * lanes + c], total[0], total[1], g.count());
        static_cast<A*>(p.unbiased_var)[c] = static_cast<A>(of.unbiased_var);
      } else {
        of.mean = vector(p.running_mean)[c];
        of.var = vector(p.running_var)[c];
      }
      const A rstd = A(1) / root(static_cast<A>(of.var + p.eps));
      static_cast<A*>(p.mean)[c] = static_cast<A>(of.mean);
      static_cast<A*>(p.rstd)[c] = rstd;
      set_affine(c, static_cast<A>(of.mean), rstd);
    };
    const auto apply = [&](const Strips& strips) FI_NOINLINE {
      const Lanes<A, kAffine> lane(g, values, strips.c);
      strips.each([&](const Strip& strip) {
        const Elements<kAffine> element(*this, lane, strip);
        const Rows<T> residual = source(p.residual).in(strip);
        for (std::int64_t r = 0; r < strip.rows; ++r) {
          T* out = y + strip.first + r * strip.row;
          std::uint64_t bits = 0;
          each_lane<T>(strip, [&](auto pack, std::int64_t j) {
            using P = decltype(pack);
            auto z = element.template pre_activation<P>(r, j);
            if constexpr (!kSmooth) z += P::load(residual.at(r, j));
            if constexpr (Masked) bits |= std::uint64_t{P::bits_of(z > typename P::X{})} << j;
            P::store(out + j, Function::template value<P>(z, alpha));
          });
          if constexpr (Masked) {
            std::uint8_t* to = mask + strip.bits + r * strip.bits_row;
            for (std::int64_t j = 0; j < strip.width; j += 8) to[j / 8] = bits >> j & 0xff;
          }
        }
      });
    };
    two_passes<2>(g, partial, p.training, true, sum, combine, apply);
  }

  // ---- backward

  void load_affine() const {
    for (std::int64_t c = 0; c < p.channels; ++c) {
      set_affine(c, vector(p.mean)[c], vector(p.rstd)[c]);
    }
  }

  void backward() const {
    load_affine();
    T *gx = static_cast<T*>(p.gx), *gresidual = static_cast<T*>(p.gresidual);
    const auto sum = [&](const Strips& strips, double* out, std::int64_t stride) FI_NOINLINE {
      const Lanes<A, kAffine> lane(g, values, strips.c);
      strips.each([&](const Strip& strip) {
        const Elements<kAffine> element(*this, lane, strip);
        sum_rows<T, 2>(strip, out, stride,
                       [&](auto pack, std::int64_t r, std::int64_t j, auto* sum) {
                         using P = decltype(pack);
                         const auto gj = element.template times<P>(
                             element.template slope<P>(r, j), P::load(element.gy.at(r, j)));
                         sum[0] += gj;
                         sum[1] += gj * element.template normalised<P>(r, j);
                       });
      });
    };
    const auto combine = [&](std::int64_t c, const double* total) {
      const NormBackward by = norm_backward(values[kScale * lanes + c], values[kRstd * lanes + c],
                                            total[0], total[1], share());
      set(kConst, c, by.constant);
      set(kX, c, by.by_d);
      if (p.gbias != nullptr) static_cast<A*>(p.gbias)[c] = static_cast<A>(total[0]);
      if (p.gweight != nullptr) static_cast<A*>(p.gweight)[c] = static_cast<A>(total[1]);
    };
    const auto apply = [&](const Strips& strips) FI_NOINLINE {
      const Lanes<A, kBackward> lane(g, values, strips.c);
      strips.each([&](const Strip& strip) {
        const Elements<kBackward> element(*this, lane, strip);
        const Rows<T> addend = source(p.addend).in(strip);
        for (std::int64_t r = 0; r < strip.rows; ++r) {
          const std::int64_t at = strip.first + r * strip.row;
          each_lane<T>(strip, [&](auto pack, std::int64_t j) {
            using P = decltype(pack);
            const auto gj = element.template times<P>(element.template slope<P>(r, j),
                                                      P::load(element.gy.at(r, j)));
            if (gresidual != nullptr) P::store(gresidual + at + j, gj);
            if (gx != nullptr) {
              const auto of = [&](int value) { return element.template of<P>(value, j); };
              P::store(gx + at + j, of(kScale) * gj + of(kConst) +
                                        of(kX) * element.template centred<P>(r, j) +
                                        P::load(addend.at(r, j)));
            }
          });
        }
      });
    };
    const bool need_sums = p.training ? gx != nullptr || p.gbias != nullptr : p.gbias != nullptr;
    two_passes<2>(g, partial, need_sums, gx != nullptr || gresidual != nullptr, sum, combine, apply);
  }

  static constexpr int kSums = kSmooth ? kSumsSmooth : kSumsPiecewise;

  void backward_backward() const {
    load_affine();
    T *ggy = static_cast<T*>(p.ggy), *gx2 = static_cast<T*>(p.gx2),
      *gresidual2 = static_cast<T*>(p.gresidual2);
    const auto sum = [&](const Strips& strips, double* out, std::int64_t stride) FI_NOINLINE {
      const Lanes<A, kAffine> lane(g, values, strips.c);
      strips.each([&](const Strip& strip) {
        const Elements<kAffine> element(*this, lane, strip);
        sum_rows<T, kSums>(
            strip, out, stride, [&](auto pack, std::int64_t r, std::int64_t j, auto* sum) {
              using P = decltype(pack);
              const auto gyj = P::load(element.gy.at(r, j));
              typename P::X u{}, w{};
              if constexpr (kSmooth) {
                u = P::load(element.u.at(r, j));
                w = element.template curvature<P>(r, j) * gyj;
              }
              add_second_terms<kSmooth>(
                  sum, element.template normalised<P>(r, j), P::load(element.v.at(r, j)),
                  element.template times<P>(element.template slope<P>(r, j), gyj), u, w);
            });
      });
    };
    const auto combine = [&](std::int64_t c, const double* total) {
      const NormSecond by = norm_second<kSmooth>(
          {values[kScale * lanes + c], values[kRstd * lanes + c], at(p.a_weight, c, A(0)),
           at(p.a_bias, c, A(0)), at(p.sum_g, c, A(0)), at(p.sum_gx, c, A(0)), share()},
          total);
      if (p.gweight2 != nullptr) static_cast<A*>(p.gweight2)[c] = static_cast<A>(by.gweight);
      if (p.gbias2 != nullptr) static_cast<A*>(p.gbias2)[c] = static_cast<A>(by.gbias);
      set(kQConst, c, by.q_constant);
      set(kQX, c, by.q_d);
      set(kGConst, c, by.constant);
      set(kGX, c, by.by_d);
      set(kGV, c, by.by_v);
      set(kGG, c, by.by_g);
    };
    const auto apply = [&](const Strips& strips) FI_NOINLINE {
      const Lanes<A, kSecond> lane(g, values, strips.c);
      strips.each([&](const Strip& strip) {
        const Elements<kSecond> element(*this, lane, strip);
        for (std::int64_t r = 0; r < strip.rows; ++r) {
          const std::int64_t at = strip.first + r * strip.row;
          each_lane<T>(strip, [&](auto pack, std::int64_t j) {
            using P = decltype(pack);
            const auto of = [&](int value) { return element.template of<P>(value, j); };
            const auto d = element.template centred<P>(r, j);
            const auto gyj = P::load(element.gy.at(r, j)), vj = P::load(element.v.at(r, j));
            const auto slope = element.template slope<P>(r, j);
            const auto q =
                of(kScale) * vj + P::load(element.u.at(r, j)) + of(kQX) * d + of(kQConst);
            auto second = of(kGConst) + of(kGX) * d + of(kGV) * vj +
                          of(kGG) * element.template times<P>(slope, gyj);
            if constexpr (kSmooth) {
              const auto h = element.template curvature<P>(r, j) * gyj * q;
              if (gresidual2 != nullptr) P::store(gresidual2 + at + j, h);
              second += of(kScale) * h;
            }
            if (ggy != nullptr) P::store(ggy + at + j, element.template times<P>(slope, q));
            if (gx2 != nullptr) P::store(gx2 + at + j, second);
          });
        }
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
