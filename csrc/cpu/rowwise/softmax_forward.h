// Softmax along rows that lie along memory, forward: a row, or a chunk of a wide one.
#pragma once

#include "softmax_short.h"

namespace fusedattn::FUSEDATTN_ISA {
namespace {

// Does nothing, to whatever it is told.
struct Nothing {
  FUSEDATTN_MEMBER void operator()(int64_t) const {}
};

// The largest of numbers of 16 bits, found among integers: if one is above 0 it is the largest word
// with a sign, else the least without. n is at least a vector.
template <class Word, class T>
FUSEDATTN_INLINE float highest_among(const T* x, int64_t n, bool ahead) {
  typedef Word words __attribute__((vector_size(vector_bytes)));
  constexpr bool least = std::is_unsigned_v<Word>;
  constexpr int w = 2 * width<float>;
  words high[unroll];
  for (auto& each : high) each = words{} - Word(least);
  const auto take = [&](int v, words y) __attribute__((always_inline)) {
    high[v] = (least ? y < high[v] : y > high[v]) ? y : high[v];
  };
  int64_t i = 0;
  for (; i + unroll * w <= n; i += unroll * w) {
    if (ahead) [[unlikely]]
      fetch_ahead(x + i, unroll * w, prefetch);
#pragma GCC unroll 4
    for (int v = 0; v < unroll; ++v) take(v, load_bits<words>(x + i + v * w));
  }
  for (; i + w <= n; i += w) take(0, load_bits<words>(x + i));
  take(1, load_bits<words>(x + n - w));
#pragma GCC unroll 3
  for (int v = 1; v < unroll; ++v) take(0, high[v]);
  // In the upper half of a float they are in the order of their numbers.
  const ints<float> pairs = (ints<float>)high[0];
  const vec<float> one = (vec<float>)(pairs << 16);
  const vec<float> other = (vec<float>)(pairs & int32_t(0xffff0000));
  const float highest = reduce_max(maximum(one, other));
  uint32_t bits;
  memcpy(&bits, &highest, sizeof bits);
  return to_float(T{uint16_t(bits >> 16)});
}

// The largest of n numbers; a NaN is passed over or taken, and shows in the sum.
template <class T>
FUSEDATTN_INLINE compute_t<T> highest(const T* x, int64_t n, bool ahead) {
  typedef compute_t<T> S;
  constexpr int w = width<S>;
  if constexpr (sizeof(T) == 2) {
    if (n >= 2 * w) {
      const S above_0 = highest_among<int16_t>(x, n, ahead);
      return above_0 > 0 ? above_0 : highest_among<uint16_t>(x, n, ahead);
    }
  }
  vec<S> high[unroll];
  for (auto& each : high) each = splat(-infinity<S>);
  for_vectors<S>(n, [&](int v, int64_t j, auto left) {
    if (v == 0 && ahead) [[unlikely]]
      fetch_ahead(x + j, unroll * w, prefetch);
    high[v] = maximum(load_some(x + j, left, -infinity<S>), high[v]);
  });
  return reduce_max(maximum(maximum(high[0], high[1]), maximum(high[2], high[3])));
}

// e = 2^exponent(x), with room for whole vectors; returns their sum. Fetches the row at `next`;
// also(j) goes before the `unroll` vectors from j on.
template <int Degree, class T, class Exponent, class Next = T, class Also = Nothing>
FUSEDATTN_INLINE compute_t<T> exponentials(const T* x, int64_t n, const Exponent& exponent,
                                           compute_t<T>* e, const Next* next = nullptr,
                                           const Also& also = {}) {
  typedef compute_t<T> S;
  return sum_of_vectors<S>(n, [&](int v, int64_t j, auto left) {
    if (v == 0 && next) fetch_lines(next + j, unroll * width<S>, prefetch);
    if (v == 0) also(j);
    const vec<S> y = exp2<Degree>(exponent(load_some(x + j, left, -infinity<S>)));
    store(e + j, y);
    return y;
  });
}

// out = inverse · e.
template <class T, class S = compute_t<T>>
FUSEDATTN_INLINE void scaled(const S* e, int64_t n, S inverse, bool streamed, T* out) {
  write_values(out, n, streamed, [=](int64_t j, auto) { return load(e + j) * inverse; });
}

// A row whose exponentials wait to be written: out = inverse · e.
template <class T>
struct Waiting {
  typedef compute_t<T> S;
  const S* e = nullptr;
  T* out = nullptr;
  int64_t n = 0;
  S inverse = 0;

  static constexpr int64_t block = unroll * width<S>;

  // The block at j, if whole.
  FUSEDATTN_MEMBER void write_block(int64_t j, bool streamed) const {
    constexpr int w = width<S>;
    if (j + block > n) return;
#pragma GCC unroll 2
    for (int64_t i = j; i < j + block; i += 2 * w) {
      const vec<S> a = load(e + i) * inverse, b = load(e + i + w) * inverse;
      streamed ? stream_pair<S>(out + i, a, b) : set_pair<S>(out + i, a, b);
    }
  }
  // From j on.
  void write(int64_t j, bool streamed) const {
    scaled<T>(e + j, n - j, inverse, streamed, out + j);
  }
  // What `write_block` leaves.
  void write_rest() const { write(n - n % block, false); }
};

// The largest score of a chunk and the sum of its exponentials relative to that.
template <class S>
struct Part {
  S high, sum;
};

template <class T>
struct ForwardRows {
  typedef T Element;
  typedef compute_t<T> S;
  static constexpr int degree = exp2_degree<T>;
  const SoftmaxForward& p;
  const Scores<T> scores{p};
  const bool direct = !p.bias && (!p.mask || p.mask.stride[3] == 0) && scores.multiplier == 1 &&
                      p.x.stride[3] == 1;  // the scores are x as it lies
  const bool large = outgrows_caches(1, threads_for_elements(p.work()), p.work(), p.x, p.out);
  const int64_t on = p.x.stride[2] * rows_on((large || last_cache_is_far()) && p.x.stride[3] == 1,
                                             p.rows(), p.width() * int64_t(sizeof(T)));

  // Columns that the row may see; what is masked in between is no less computed.
  int64_t visible(const Index& at) const {
    if (p.mask && p.mask.stride[3] == 0 && !*p.mask.at<const uint8_t>(at.b, at.h, at.i)) return 0;
    return seen_columns(p, at.i);
  }

  // Runs f on the scores of columns [j0, j0 + n), which are x itself or else in e.
  template <class F>
  FUSEDATTN_MEMBER auto with_scores(const Index& at, int64_t j0, int64_t n, S* e, F f) const {
    if (direct) return f(p.x.at<const T>(at.b, at.h, at.i, j0));
    prepare(at, j0, n, e);
    return f(const_cast<const S*>(e));
  }

  // e = the exponentials of scores x relative to their own maximum, of a row or of a part; fetches
  // the row at `next`.
  template <class X, class Also = Nothing>
  S exponentiate_row(const X* x, int64_t n, S high, S* e, const T* next,
                     const Also& also = {}) const {
    return with_exponent<T>(finite_origin(high), scores.factor, [&](const auto& exponent) {
      return exponentials<degree>(x, n, exponent, e, next, also);
    });
  }
  template <class X>
  S exponentiate_part(const X* x, int64_t n, S high, S* e) const {
    return exponentials<degree>(x, n, exponent_of(finite_origin(high), scores.factor), e);
  }

  void write(const Index& at, int64_t j0, int64_t n, const S* e, S inverse) const {
    T* out = p.out.at<T>(at.b, at.h, at.i, j0);
    if (p.out.stride[3] != 1) {
      store_row(out, p.out.stride[3], n, e, inverse);
      return;
    }
    scaled<T>(e, n, inverse, large, out);
  }

  void write_zeros(const Index& at, int64_t j0, int64_t j1) const {
    zero(p.out.at<T>(at.b, at.h, at.i, j0), p.out.stride[3], j1 - j0);
  }

  // Nothing but rows of x, each along memory: what most calls are.
  bool plain() const {
    return direct && !p.mask && p.out.stride[3] == 1 && p.options.causal == SoftmaxCausal::none;
  }

  // Where a row goes past the caches it is written while the next one is read, so that memory does
  // both all the time. In 16 bits arithmetic sets the pace, and gains nothing.
  void plain_rows(S* copy) const {
    if constexpr (sizeof(T) > 2) {
      if (large) return plain_rows_by_turns(copy);
    }
    for_rows(p, [&](const Index& at) { plain_row(at, copy, Nothing{}).write(0, large); });
  }

  void plain_rows_by_turns(S* copy) const {
    Waiting<T> before;
    for_rows(p, [&](const Index& at) {
      const bool streamed = can_stream(before.out);
      const Waiting<T> row = plain_row(at, before.e == copy ? copy + chunk : copy,
                                       [&](int64_t j) { before.write_block(j, streamed); });
      before.write_rest();
      before = row;
    });
    before.write(0, true);
  }

  template <class Also>
  Waiting<T> plain_row(const Index& at, S* e, const Also& also) const {
    const int64_t n = p.width();
    const T* const x = p.x.at<const T>(at.b, at.h, at.i);
    const S high = highest(x, n, large && !on);
    const S sum = exponentiate_row(x, n, high, e, on ? x + on : nullptr, also);
    return {e, p.out.at<T>(at.b, at.h, at.i), n, reciprocal(sum)};
  }

  template <int Vectors>
  void short_row(const Index& at, const ShortRow<T, Vectors>& row) const {
    row.template forward<degree>(p.x.at<const T>(at.b, at.h, at.i), on, scores.factor, large,
                                 p.out.at<T>(at.b, at.h, at.i));
  }

  void narrow(const Index& at, S* e) const {
    const int64_t n = visible(at);
    const T* const next = on ? p.x.at<const T>(at.b, at.h, at.i) + on : nullptr;
    const S sum = with_scores(at, 0, n, e, [&](auto* x) {
      return exponentiate_row(x, n, highest(x, n, direct && large && !on), e, next);
    });
    write(at, 0, n, e, reciprocal(sum));
    write_zeros(at, n, p.width());
  }

  Part<S> part(const Index& at, int64_t c, S* e) const {
    const int64_t n = smaller(visible(at) - c * chunk, chunk);
    if (n <= 0) return {-infinity<S>, 0};
    return with_scores(at, c * chunk, n, e, [&](auto* x) -> Part<S> {
      const S high = highest(x, n, direct && large);
      return {high, exponentiate_part(x, n, high, e)};
    });
  }

  Part<S> combine(const Part<S>* parts, int64_t count) const {
    Part<S> row{-infinity<S>, 0};
    for (int64_t c = 0; c < count; ++c) row.high = larger(row.high, parts[c].high);
    for (int64_t c = 0; c < count; ++c) row.sum += parts[c].sum * carried(parts[c].high, row.high);
    return row;
  }

  void finish(const Index& at, int64_t c, const Part<S>& row, S* e) const {
    const int64_t j0 = c * chunk, end = smaller(p.width() - j0, chunk);
    const int64_t n = larger(smaller(visible(at) - j0, chunk), int64_t(0));
    if (n > 0) {
      with_scores(at, j0, n, e, [&](auto* x) { exponentiate_part(x, n, row.high, e); });
      write(at, j0, n, e, reciprocal(row.sum));
    }
    write_zeros(at, j0 + n, j0 + end);
  }

 private:
  S carried(S high, S highest) const {
    return exp2<6>(splat((high - finite_origin(highest)) * scores.factor))[0];
  }

  // e[j] = the score, −inf where masked; whole vectors.
  void prepare(const Index& at, int64_t j0, int64_t n, S* e) const {
    const int64_t wide = round_up(n, width<S>);
    load_row(p.x.at<const T>(at.b, at.h, at.i, j0), p.x.stride[3], n, e, wide);
    if (p.bias) {
      alignas(64) S bias[chunk];
      scores.load_bias(p.bias.offset(at.b, at.h, at.i, j0), n, bias, wide);
      for (int64_t j = 0; j < n; j += width<S>)
        store(e + j, load(e + j) * scores.multiplier + load(bias + j));
    } else if (scores.multiplier != 1) {
      for (int64_t j = 0; j < n; j += width<S>) store(e + j, load(e + j) * scores.multiplier);
    }
    if (p.mask) mask_row(p.mask.at<const uint8_t>(at.b, at.h, at.i, j0), p.mask.stride[3], n, e);
    for (int64_t j = n; j < wide; ++j) e[j] = -infinity<S>;
  }
};

}  // namespace
}  // namespace fusedattn::FUSEDATTN_ISA
