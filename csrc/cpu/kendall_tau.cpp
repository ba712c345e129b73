// Counts the pairs of each row one by one while rows are short, in vectors; long rows take Knight's
// way, which sorts twice: by (a, b), then by b, where every exchange is a pair that disagrees.
#include "arch.h"

namespace fastinterp {
namespace cpu {
namespace FI_ARCH {
namespace {

constexpr std::int64_t kSerialPairs = 1 << 16;  // below which threads cost more

// Columns up to which counting is faster. Measured on one core of an AMD EPYC without AVX-512, for
// which twice as many lanes are taken to gain a third.
template <typename A>
constexpr std::int64_t longest_counted() {
#if defined(__AVX512F__)
  return 8192 / sizeof(A);
#elif defined(__AVX2__)
  return 6144 / sizeof(A);
#else
  return sizeof(A) == 4 ? 512 : 24;  // SSE2 does not compare 64-bit integers
#endif
}

template <typename A>
std::int64_t count_nans(const A* a, const A* b, std::int64_t m) {
  std::int64_t nans = 0;
  for (std::int64_t i = 0; i < m; ++i) nans += (a[i] != a[i]) + (b[i] != b[i]);
  return nans;
}

// ---- short rows

template <typename A>
struct Lane;  // an integer as wide as A
template <>
struct Lane<float> {
  using type = std::int32_t;
};
template <>
struct Lane<double> {
  using type = std::int64_t;
};

template <typename A>
PairCounts count_pairs(const A* a, const A* b, std::int64_t m) {
  using I = typename Lane<A>::type;
  PairCounts total{0, 0, 0, 0};
  for (std::int64_t i = 1; i < m; ++i) {
    const A ai = a[i], bi = b[i];
    I differ_a = 0, differ_b = 0, both = 0, opposed = 0;
#pragma omp simd reduction(+ : differ_a, differ_b, both, opposed)
    for (std::int64_t j = 0; j < i; ++j) {
      const I da = ai != a[j], db = bi != b[j], up_a = ai > a[j], up_b = bi > b[j];
      differ_a += da;
      differ_b += db;
      both += da & db;
      opposed += da & db & (up_a ^ up_b);
    }
    total.differ_a += differ_a;
    total.differ_b += differ_b;
    total.agreement += both - 2 * std::int64_t{opposed};
  }
  return total;
}

// ---- long rows

template <typename A>
struct Pair {
  A a, b;
};
template <typename A>
inline bool before(const Pair<A>& p, const Pair<A>& q) {  // without a branch to mispredict
  return (p.a < q.a) | ((p.a == q.a) & (p.b < q.b));
}
inline bool before(float p, float q) { return p < q; }
inline bool before(double p, double q) { return p < q; }

// Sorts m values between `from` and `to` in turn; `from` then points to the sorted ones. Gives the
// number of exchanges of neighbours that this takes.
template <typename V>
std::int64_t sort(V*& from, V*& to, std::int64_t m) {
  std::int64_t exchanges = 0;
  for (std::int64_t width = 1; width < m; width *= 2) {
    for (std::int64_t begin = 0; begin < m; begin += 2 * width) {
      const std::int64_t middle = begin + width < m ? begin + width : m;
      const std::int64_t end = middle + width < m ? middle + width : m;
      std::int64_t i = begin, j = middle, k = begin;
      while (i < middle && j < end) {
        const bool right = before(from[j], from[i]);
        to[k++] = right ? from[j] : from[i];
        exchanges += right ? middle - i : 0;
        i += !right;
        j += right;
      }
      while (i < middle) to[k++] = from[i++];
      while (j < end) to[k++] = from[j++];
    }
    V* sorted = to;
    to = from;
    from = sorted;
  }
  return exchanges;
}

// Pairs among m sorted values that are the same.
template <typename V>
std::int64_t ties(const V* sorted, std::int64_t m) {
  std::int64_t pairs = 0, run = 0;
  for (std::int64_t i = 1; i < m; ++i) {
    run = before(sorted[i - 1], sorted[i]) ? 0 : run + 1;
    pairs += run;
  }
  return pairs;
}

template <typename A>
PairCounts sort_pairs(const A* a, const A* b, std::int64_t m, Pair<A>* scratch) {
  Pair<A>*from = scratch, *to = scratch + m;
  for (std::int64_t i = 0; i < m; ++i) from[i] = {a[i], b[i]};
  sort(from, to, m);
  const std::int64_t tied_both = ties(from, m);
  A *values = reinterpret_cast<A*>(to), *other = values + m;
  for (std::int64_t i = 0; i < m; ++i) values[i] = from[i].a;
  const std::int64_t tied_a = ties(values, m);
  for (std::int64_t i = 0; i < m; ++i) values[i] = from[i].b;
  const std::int64_t opposed = sort(values, other, m);
  const std::int64_t tied_b = ties(values, m), all = m * (m - 1) / 2;
  return {all - tied_a - tied_b + tied_both - 2 * opposed, all - tied_a, all - tied_b, 0};
}

template <typename A>
void run(const KendallTau& p) {
  const std::int64_t m = p.columns, rows = p.rows;
  const A *a = static_cast<const A*>(p.a), *b = static_cast<const A*>(p.b);
  Pair<A>* scratch = static_cast<Pair<A>*>(p.scratch);
  const bool parallel = p.threads > 1 && rows > 1 && rows * m * m / 2 >= kSerialPairs;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel)
  for (std::int64_t n = 0; n < rows; ++n) {
    const A *an = a + n * m, *bn = b + n * m;
    PairCounts counts{0, 0, 0, count_nans(an, bn, m)};
    if (counts.nans == 0) {  // or they could not be sorted
      counts = m <= longest_counted<A>() ? count_pairs(an, bn, m)
                                         : sort_pairs(an, bn, m, scratch + 2 * m * thread_index());
    }
    p.tau[n] = kendall_tau_b(counts);
  }
}

}  // namespace

std::int64_t kendall_tau_scratch_bytes(const KendallTau& p) {
  return p.columns <= longest_counted<double>() ? 0 : 4 * 8 * p.columns * p.threads;
}

void kendall_tau(const KendallTau& p) {
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    run<acc_t<T>>(p);
  });
}

}  // namespace FI_ARCH
}  // namespace cpu
}  // namespace fastinterp
