// y = phi(gamma xh + beta + residual), xh = (x - mean) rstd with the statistics of a group of L
// elements, and its first two derivatives. With mean(.) over a group,
//     P(t) = t - mean(t) - xh mean(t xh)
//
// With g = phi'(z) gy and h = gamma g:
//     gx = rstd P(h)      gresidual = g      ggamma = sum g xh      gbeta = sum g
// Cotangents v of gx, u of gresidual, a of ggamma and b of gbeta pair with these to
//     F = rstd sum h P(v) + sum g (u + a xh + b)                  (P is symmetric)
// q is F's derivative with respect to g; k what F, through g, changes with z; X what it changes with
// xh, rstd held; rstd itself changes with x by -rstd^2 xh / L:
//     q   = gamma rstd P(v) + u + a xh + b        k = phi''(z) gy q
//     X   = -rstd (v mean(h xh) + h mean(v xh)) + a g + gamma k
//     ggy = phi'(z) q      gresidual2 = k      gbeta2 = sum k      ggamma2 = sum (rstd g P(v) + k xh)
//     gx2 = rstd P(X) - rstd^2 xh mean(h P(v))
// X is made of v and h less their means: P(1) = 0, and what is left would cancel. Passes over a block
// of groups follow each other while it is in the cache; h and X wait in a buffer.
#include "groups.h"

namespace fastinterp {
namespace cpu {
namespace FI_ARCH {
namespace {

enum { kGamma, kBeta, kA, kB, kChannelValues };
enum { kMean, kRstd, kH, kHx, kV, kVx, kConst, kByXh, kGroupValues };  // kH: mean(h), kHx: mean(h xh)

template <typename T, Activation K>
struct Kernel : GroupWorker<T, kChannelValues, kGroupValues, 3, 2> {
  using Base = GroupWorker<T, kChannelValues, kGroupValues, 3, 2>;
  using A = acc_t<T>;
  using Function = Phi<T, K>;
  using Base::g;
  const NormAct& p;
  const A alpha;

  Kernel(const NormAct& params, const Groups& groups, void* memory, double* channel_totals)
      : Base(groups, static_cast<A*>(memory), channel_totals),
        p(params),
        alpha(static_cast<A>(p.alpha)) {}

  void begin(const Block& block) const {
    Base::begin(block);
    this->set_channels(block, kGamma, p.weight, A(1));
    this->set_channels(block, kBeta, p.bias, A(0));
    this->set_channels(block, kA, p.a_weight, A(0));
    this->set_channels(block, kB, p.a_bias, A(0));
  }
  // A value of every group of the block, given or made by f(i) and written out where there is room.
  void set_groups(const Block& block, int value, const void* data) const {
    const A* from = static_cast<const A*>(data);
    for (std::int64_t i = 0; i < block.groups; ++i) {
      this->set_group(block, value, i, from == nullptr ? A(0) : from[block.group + i]);
    }
  }
  template <typename F>
  void make_groups(const Block& block, int value, void* out, F f) const {
    for (std::int64_t i = 0; i < block.groups; ++i) {
      const A v = static_cast<A>(f(i));
      this->set_group(block, value, i, v);
      if (out != nullptr) static_cast<A*>(out)[block.group + i] = v;
    }
  }

  // What an element is made of. Null pointers stand for zeros, and for what is not wanted.
  struct Elements : Values<A> {
    const T *data_x, *data_residual;

    explicit Elements(const Kernel& k)
        : Values<A>(k.values),
          data_x(static_cast<const T*>(k.p.x)),
          data_residual(static_cast<const T*>(k.p.residual)) {}

    template <typename P>
    typename P::X centred(const Place& at) const {
      return P::load(data_x + at.tensor) - this->template of_group<P>(kMean, at);
    }
    template <typename P>
    typename P::X normalised(const Place& at) const {
      return centred<P>(at) * this->template of_group<P>(kRstd, at);
    }
    template <typename P>
    typename P::X pre_activation(typename P::X xh, const Place& at) const {
      return xh * this->template of_channel<P>(kGamma, at) +
             this->template of_channel<P>(kBeta, at) + read<P>(data_residual, at);
    }
    // rstd (t - mean - xh mean(t xh)) for the t that waits in the buffer
    template <typename P>
    typename P::X projected(int mean, int mean_x, const Place& at) const {
      const auto of = [&](int value) { return this->template of_group<P>(value, at); };
      return of(kRstd) * (P::values(this->buffer + at.buffer) - of(mean) -
                          normalised<P>(at) * of(mean_x));
    }
  };
  template <typename P>
  static typename P::X read(const T* data, const Place& at) {
    return data == nullptr ? typename P::X{} : P::load(data + at.tensor);
  }
  template <typename P>
  static void write(T* data, const Place& at, typename P::X v) {
    if (data != nullptr) P::store(data + at.tensor, v);
  }
  static const T* input(const void* data) { return static_cast<const T*>(data); }
  static T* output(void* data) { return static_cast<T*>(data); }

  // ---- the three orders

  void forward(const Block& block) {
    const Elements e(*this);
    const Block flat = g.without_channels(block);
    const A alpha = this->alpha;
    T* const y = output(p.y);
    // Something near the mean, for the sums to be small.
    const auto pivot = [&](std::int64_t i) {
      return load(e.data_x + block.first + i * g.group_channels);
    };
    make_groups(block, kMean, nullptr, pivot);
    this->template sum<1, 0>(flat, [&](auto pack, const Place& at, auto* term) {
      term[0] = e.template centred<decltype(pack)>(at);
    });
    make_groups(block, kMean, p.mean, [&](std::int64_t i) { return pivot(i) + this->mean(0, i); });
    this->template sum<1, 0>(flat, [&](auto pack, const Place& at, auto* term) {
      const auto d = e.template centred<decltype(pack)>(at);
      term[0] = d * d;
    });
    make_groups(block, kRstd, p.rstd, [&](std::int64_t i) {
      return A(1) / root(static_cast<A>(this->mean(0, i) + p.eps));
    });
    each(block, [&](auto pack, const Place& at) {
      using P = decltype(pack);
      const auto z = e.template pre_activation<P>(e.template normalised<P>(at), at);
      P::store(y + at.tensor, Function::template value<P>(z, alpha));
    });
  }

  void backward(const Block& block) {
    const Elements e(*this);
    const Block flat = g.without_channels(block);
    const A alpha = this->alpha;
    const T *const gy = input(p.gy), *const addend = input(p.addend);
    T *const gx = output(p.gx), *const gresidual = output(p.gresidual);
    set_groups(block, kMean, p.mean);
    set_groups(block, kRstd, p.rstd);
    this->template sum<2, 2>(block, [&](auto pack, const Place& at, auto* term) {
      using P = decltype(pack);
      const auto xh = e.template normalised<P>(at);
      const auto slope = Function::template slope<P>(e.template pre_activation<P>(xh, at), alpha);
      const auto g = Function::template times<P>(slope, P::load(gy + at.tensor), alpha);
      const auto h = e.template of_channel<P>(kGamma, at) * g;
      write<P>(gresidual, at, g);
      P::put(e.buffer + at.buffer, h);
      term[0] = h;
      term[1] = h * xh;
      term[2] = g * xh;
      term[3] = g;
    });
    make_groups(block, kH, p.mean_h, [&](std::int64_t i) { return this->mean(0, i); });
    make_groups(block, kHx, p.mean_hx, [&](std::int64_t i) { return this->mean(1, i); });
    if (gx == nullptr) return;
    each(flat, [&](auto pack, const Place& at) {
      using P = decltype(pack);
      const auto own = e.template projected<P>(kH, kHx, at);
      P::store(gx + at.tensor, own + read<P>(addend, at));
    });
  }

  void backward_backward(const Block& block) {
    const Elements e(*this);
    const Block flat = g.without_channels(block);
    const A alpha = this->alpha;
    const T *const gy_data = input(p.gy), *const v_data = input(p.v), *const u_data = input(p.u);
    T *const ggy = output(p.ggy), *const gx2 = output(p.gx2), *const k_data = output(p.gresidual2);
    set_groups(block, kMean, p.mean);
    set_groups(block, kRstd, p.rstd);
    set_groups(block, kH, p.mean_h);
    set_groups(block, kHx, p.mean_hx);
    set_groups(block, kV, nullptr);
    set_groups(block, kVx, nullptr);
    if (v_data != nullptr) {
      this->template sum<2, 0>(flat, [&](auto pack, const Place& at, auto* term) {
        using P = decltype(pack);
        term[0] = P::load(v_data + at.tensor);
        term[1] = term[0] * e.template normalised<P>(at);
      });
      make_groups(block, kV, nullptr, [&](std::int64_t i) { return this->mean(0, i); });
      make_groups(block, kVx, nullptr, [&](std::int64_t i) { return this->mean(1, i); });
    }
    this->template sum<3, 2>(block, [&](auto pack, const Place& at, auto* term) {
      using P = decltype(pack);
      const auto of = [&](int value) { return e.template of_group<P>(value, at); };
      const auto channel = [&](int value) { return e.template of_channel<P>(value, at); };
      const auto xh = e.template normalised<P>(at), z = e.template pre_activation<P>(xh, at);
      const auto gy = P::load(gy_data + at.tensor), rstd = of(kRstd);
      const auto slope = Function::template slope<P>(z, alpha);
      const auto g = Function::template times<P>(slope, gy, alpha), h = channel(kGamma) * g;
      const auto v = read<P>(v_data, at) - of(kV), pv = v - xh * of(kVx);
      const auto q =
          channel(kGamma) * rstd * pv + read<P>(u_data, at) + channel(kA) * xh + channel(kB);
      auto by_xh = channel(kA) * g - rstd * (v * of(kHx) + (h - of(kH)) * of(kVx));
      term[3] = rstd * g * pv;
      term[4] = typename P::X{};
      if constexpr (Function::smooth) {
        const auto k = Function::template curvature<P>(z, alpha) * gy * q;
        write<P>(k_data, at, k);
        by_xh += channel(kGamma) * k;
        term[3] += k * xh;
        term[4] = k;
      }
      write<P>(ggy, at, Function::template times<P>(slope, q, alpha));
      P::put(e.buffer + at.buffer, by_xh);
      term[0] = by_xh;
      term[1] = by_xh * xh;
      term[2] = h * pv;
    });
    if (gx2 == nullptr) return;
    make_groups(block, kConst, nullptr, [&](std::int64_t i) { return this->mean(0, i); });
    make_groups(block, kByXh, nullptr, [&](std::int64_t i) {
      const double rstd = static_cast<const A*>(p.rstd)[block.group + i];
      return this->mean(1, i) + rstd * this->mean(2, i);
    });
    each(flat, [&](auto pack, const Place& at) {
      using P = decltype(pack);
      P::store(gx2 + at.tensor, e.template projected<P>(kConst, kByXh, at));
    });
  }

  template <typename F>
  void each(const Block& block, F f) const {
    Base::each(block, f, [](std::int64_t, std::int64_t) {});
  }
};

template <typename K>
struct Type {
  using type = K;
};

// Calls f(Type<Kernel>) for the element type and the activation of p.
template <typename F>
void with_kernel(const NormAct& p, F f) {
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    switch (p.activation) {
      case Activation::identity:
        return f(Type<Kernel<T, Activation::identity>>{});
      case Activation::relu:
        return f(Type<Kernel<T, Activation::relu>>{});
      case Activation::leaky_relu:
        return f(Type<Kernel<T, Activation::leaky_relu>>{});
      case Activation::softplus:
        return f(Type<Kernel<T, Activation::softplus>>{});
      case Activation::silu:
        return f(Type<Kernel<T, Activation::silu>>{});
      case Activation::gelu:
        return f(Type<Kernel<T, Activation::gelu>>{});
    }
  });
}

template <typename K>
Groups groups_of(const NormAct& p) {
  return Groups(p, Vector<typename K::A>::lanes);
}
// Channel sums of every part, in whole cache lines; the threads' own memory follows them.
std::int64_t totals_bytes(const Groups& g) {
  return (g.parts * 2 * g.channels * sizeof(double) + 63) / 64 * 64;
}

// run(kernel, block) for every block of every example; then gweight and gbias, the sums per channel.
template <typename Run>
void for_blocks(const NormAct& p, void* gweight, void* gbias, Run run) {
  with_kernel(p, [&](auto type) {
    using K = typename decltype(type)::type;
    using A = typename K::A;
    const Groups g = groups_of<K>(p);
    const bool channel_wise = gweight != nullptr || gbias != nullptr;
    const std::int64_t parts = g.parts, blocks = g.blocks;
    double* const all = static_cast<double*>(p.scratch);
    char* const memory = static_cast<char*>(p.scratch) + totals_bytes(g);
#pragma omp parallel for schedule(static) num_threads(p.threads) \
    if (p.threads > 1 && g.examples * g.channels * g.pixels >= kSerialElements)
    for (std::int64_t i = 0; i < parts * blocks; ++i) {
      const std::int64_t part = i / blocks, b = i % blocks;
      double* const totals = channel_wise ? all + part * 2 * g.channels : nullptr;
      K kernel(p, g, memory + thread_index() * K::bytes(g), totals);
      kernel.begin(g.block(0, b));
      const std::int64_t end = g.examples * (part + 1) / parts;
      for (std::int64_t n = g.examples * part / parts; n < end; ++n) run(kernel, g.block(n, b));
      kernel.end(g.block(0, b));
    }
    void* const results[2] = {gweight, gbias};
    for (int s = 0; s < 2; ++s) {
      for (std::int64_t c = 0; results[s] != nullptr && c < g.channels; ++c) {
        double sum = 0;
        for (std::int64_t part = 0; part < parts; ++part) sum += all[(part * 2 + s) * g.channels + c];
        static_cast<A*>(results[s])[c] = static_cast<A>(sum);
      }
    }
  });
}

}  // namespace

std::int64_t norm_act_scratch_bytes(const NormAct& p) {
  std::int64_t bytes = 0;
  with_kernel(p, [&](auto type) {
    using K = typename decltype(type)::type;
    const Groups g = groups_of<K>(p);
    bytes = totals_bytes(g) + p.threads * K::bytes(g);
  });
  return bytes;
}
void norm_act_forward(const NormAct& p) {
  for_blocks(p, nullptr, nullptr, [](auto& kernel, const Block& b) { kernel.forward(b); });
}
void norm_act_backward(const NormAct& p) {
  for_blocks(p, p.gweight, p.gbias, [](auto& kernel, const Block& b) { kernel.backward(b); });
}
void norm_act_backward_backward(const NormAct& p) {
  for_blocks(p, p.gweight2, p.gbias2,
             [](auto& kernel, const Block& b) { kernel.backward_backward(b); });
}

}  // namespace FI_ARCH
}  // namespace cpu
}  // namespace fastinterp
