// Online softmax, row by row: a running maximum m, in natural units, and a running sum l.
//
// A maximum that rises by less than `slack` is left as it is: p then reaches 2^slack at most, and
// what was summed before needs no rescaling (as in FlashAttention-4).
#pragma once

#include "attention_tile.h"

namespace fusedattn::FUSEDATTN_ISA {

constexpr int slack = 8;

// The largest of the first n scores of a row.
template <class S>
FUSEDATTN_INLINE S highest_score(const S* s, int64_t n) {
  constexpr int w = width<S>;
  vec<S> high0 = splat(-infinity<S>), high1 = high0;
  int64_t j = 0;
  for (; j + 2 * w <= n; j += 2 * w) {
    high0 = maximum(load(s + j), high0);
    high1 = maximum(load(s + j + w), high1);
  }
  if (j < n) {
    high0 = maximum(select_below(int(n - j), load(s + j), high0), high0);
    high1 = maximum(select_below(int(n - j - w), load(s + j + w), high1), high1);
  }
  return reduce_max(maximum(high0, high1));
}

// p = 2^(factor · s − shift) for the first n scores of a row, 0 up to `wide`; returns their sum.
// Where `dropped`, p is 0 as well where `keep` is, but not in the sum.
template <class E, bool dropped>
FUSEDATTN_INLINE stat_of<E> probabilities(const stat_of<E>* s, int64_t n, int64_t wide,
                                          stat_of<E> factor, stat_of<E> shift, Rows<unit_of<E>> p,
                                          int64_t i, const uint8_t* keep) {
  typedef stat_of<E> S;
  constexpr int w = width<S>;
  constexpr int degree = E::exp2_degree;
  vec<S> sum0{}, sum1{};
  const vec<S> zero{};
  const auto put = [&](int64_t j, vec<S> x, vec<S> y) __attribute__((always_inline)) {
    if constexpr (dropped) {
      x = select_bytes<S>(keep + j, x, zero);
      y = select_bytes<S>(keep + j + w, y, zero);
    }
    E::put_along(p, i, j, x, y);
  };
  int64_t j = 0;
  for (; j + 2 * w <= n; j += 2 * w) {
    const vec<S> x = exp2<degree>(load(s + j) * factor - shift);
    const vec<S> y = exp2<degree>(load(s + j + w) * factor - shift);
    sum0 += x;
    sum1 += y;
    put(j, x, y);
  }
  if (j < n) {
    vec<S> x = exp2<degree>(load(s + j) * factor - shift);
    vec<S> y = exp2<degree>(load(s + j + w) * factor - shift);
    x = select_below(int(n - j), x, zero);
    y = select_below(int(n - j - w), y, zero);
    sum0 += x;
    sum1 += y;
    put(j, x, y);
    j += 2 * w;
  }
  for (; j < wide; j += 2 * w) E::put_along(p, i, j, zero, zero);
  return reduce_add(sum0 + sum1);
}

// Take one block of a row into its maximum m; where m rises, l and the n sums of o shrink. Returns
// what `probabilities` subtracts.
template <class E>
FUSEDATTN_INLINE stat_of<E> raise_maximum(const Scores<stat_of<E>>& scores, stat_of<E>* s,
                                          int64_t seen, stat_of<E>& m, stat_of<E>& l, stat_of<E>* o,
                                          int64_t n) {
  typedef stat_of<E> S;
  const S highest = highest_score(s, seen) * scores.unit;
  if (m == -infinity<S>) {
    m = highest > m ? highest : m;  // nothing has been summed yet
  } else if (highest > m + S(slack * ln2)) {
    const S carried = scores.template carried<E::exp2_degree>(m, highest);
    m = highest;
    l *= carried;
    for (int64_t c = 0; c < n; c += width<S>) store(o + c, load(o + c) * carried);
  }
  const S origin = m == -infinity<S> ? S(0) : m;
  if (scores.is_near(origin)) return scores.shift(origin);
  scores.rebase(s, seen, origin);
  return 0;
}

FUSEDATTN_INLINE float logarithm(float x) { return __builtin_logf(x); }
FUSEDATTN_INLINE double logarithm(double x) { return __builtin_log(x); }
FUSEDATTN_INLINE float power_of_two(float x) { return __builtin_exp2f(x); }
FUSEDATTN_INLINE double power_of_two(double x) { return __builtin_exp2(x); }

// A row's sum l of exponentials relative to `base`, in natural units.
template <class S>
struct RowSum {
  S base, l;
  S factor = 1;  // of the sums of values, to be relative to the same
};

// With one more exponential, that of `sink`: relative to the larger of the two.
template <class S>
static RowSum<S> with_sink(RowSum<S> x, S sink) {
  const S above = (sink - x.base) * S(log2e);
  if (above <= 0) return {x.base, x.l + power_of_two(above)};
  const S factor = power_of_two(-above), own = 1 + (sink - sink);  // of an infinite one NaN
  return {sink, x.l * factor + own, factor};
}

// out = o / l and lse = m + log l, in row i; 0 and −inf for a query that saw nothing. Returns what
// o was multiplied by, but for dropout.
template <class T>
static compute_t<T> write_row(const Scores<compute_t<T>>& scores, int64_t b, int64_t h, int64_t i,
                              compute_t<T> m, compute_t<T> l, const compute_t<T>* o) {
  typedef compute_t<T> S;
  const AttentionForward& f = scores.p;
  const int64_t dv = f.head_dim_v(), stride = f.out.stride[3];
  T* const out = f.out.at<T>(b, h, i);
  S& lse = *f.lse.at<S>(b, h, i);
  if (l == 0) {
    for (int64_t c = 0; c < dv; ++c) put(out + c * stride, 0);
    lse = -infinity<S>;
    return 0;
  }
  RowSum<S> sum{scores.is_near(m) ? S(ln2) * scores.shift(m) : m, l};
  if (f.sinks) sum = with_sink(sum, *f.sinks.at<const S>(0, h));
  const S weight = sum.factor / sum.l;
  store_row(out, stride, dv, o, weight * S(scores.dropout.factor));
  lse = sum.base + logarithm(sum.l);
  return weight;
}

}  // namespace fusedattn::FUSEDATTN_ISA
