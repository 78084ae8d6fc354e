// What forward and backward share: a thread's view of the scores of one tile.
#pragma once

#include <omp.h>

#include "attention_mask.h"
#include "dropout.h"
#include "pack.h"
#include "team.h"
#include "workspace.h"

namespace fusedattn::FUSEDATTN_ISA {

constexpr double log2e = 1.4426950408889634;
constexpr double ln2 = 0.6931471805599453;

template <class T>
FUSEDATTN_INLINE Source<T> source(const TensorView& x, int64_t b, int64_t h, int64_t i) {
  return {x.at<const T>(b, h, i), x.stride[2], x.stride[3]};
}

// Σ x·y over the first n columns of a row; the order of the sum does not depend on strides.
template <class T>
static compute_t<T> dot(Source<T> x, Source<T> y, int64_t n) {
  typedef compute_t<T> S;
  alignas(64) S a[chunk], b[chunk];
  vec<S> sums{};
  for (int64_t c = 0; c < n; c += chunk) {
    const int64_t here = smaller(n - c, chunk), wide = round_up(here, width<S>);
    load_row(x.at(0, c), x.column, here, a, wide);
    load_row(y.at(0, c), y.column, here, b, wide);
    for (int64_t i = 0; i < wide; i += width<S>) sums += load(a + i) * load(b + i);
  }
  return reduce_add(sums);
}

// tanh x: a polynomial where |x| is small (Cephes' tanhf), else by exp(2 |x|).
FUSEDATTN_INLINE vec<float> tanh(vec<float> x) {
  const vec<float> u = x * x, whole = x < 0.0f ? -x : x;
  const vec<float> size = whole > 10.0f ? splat(10.0f) : whole;  // from there on it is 1
  vec<float> near = splat(-5.70498872745e-3f);
  near = near * u + 2.06390887954e-2f;
  near = near * u - 5.37397155531e-2f;
  near = near * u + 1.33314422036e-1f;
  near = near * u - 3.33332819422e-1f;
  near = near * (u * x) + x;
  const vec<float> far = 1.0f - 2.0f / (exp2<6>(size * float(2 * log2e)) + 1.0f);
  return size > 0.625f ? (x < 0.0f ? -far : far) : near;  // NaN is near
}
FUSEDATTN_INLINE vec<double> tanh(vec<double> x) {
  for (int i = 0; i < width<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// body(B()) with the type of a bias: any float beside S = float, else double.
template <class S, class Body>
FUSEDATTN_INLINE void with_float_type(DType dtype, const Body& body) {
  if constexpr (sizeof(S) == 8) {
    body(double());
  } else if (dtype == DType::f32) {
    body(float());
  } else if (dtype == DType::bf16) {
    body(bf16());
  } else {
    body(f16());
  }
}

// Scores leave the products as raw q·k, and mostly become exponents in one instruction: factor · s
// − shift(m) with the row's maximum m. Where there is a bias, a softcap or a scale that is not
// positive, `prepare` rewrites the row, and `rebase` subtracts m before anything is multiplied by
// log2(e): a bias of −FLT_MAX has no logarithm to base 2 in float. Maxima are in natural units.
template <class S>
struct Scores {
  const AttentionForward& p;
  const Dropout dropout;
  MaskMap mask;
  const bool rewrite;
  const S unit;    // from a score, as it stands once prepared, to natural units
  const S factor;  // and to log2 units

  explicit Scores(const AttentionForward& p)
      : p(p),
        dropout(p.options.dropout_p > 0 ? Dropout(p.seed, p.options.dropout_p) : Dropout()),
        mask(p),
        rewrite(p.bias || p.alibi_slopes || p.distance_bias || !(p.options.scale > 0) ||
                p.options.softcap > 0),
        unit(rewrite ? S(1) : S(p.options.scale)),
        factor(rewrite ? S(1) : S(p.options.scale * log2e)) {}

  // Whether a row of this maximum, or log-sum-exp, needs no `rebase`. Farther out the rounding of
  // shift(m) would show in the exponents, and at last exceed them.
  FUSEDATTN_MEMBER bool is_near(S m) const {
    constexpr S far = 0x1p10;
    return !rewrite && m < far && m > -far;
  }
  FUSEDATTN_MEMBER static S shift(S m) { return rounded(m * S(log2e)); }

  // What sums relative to one maximum are multiplied by to be relative to another.
  template <int Degree>
  FUSEDATTN_MEMBER S carried(S from, S to) const {
    const bool near = is_near(from) && is_near(to);
    return exp2<Degree>(splat(near ? shift(from) - shift(to) : (from - to) * S(log2e)))[0];
  }

  // Raw scores to scores: columns [0, n) of query i from key j0 of `sequence`, number b. `scratch`
  // has room for a row. `slope` gets d score / d (scale · raw) where there is a softcap; else that
  // is 1.
  void prepare(S* s, const Sequence<int64_t>& sequence, int64_t b, int64_t h, int64_t i, int64_t j0,
               int64_t n, S* scratch, S* slope = nullptr) const {
    constexpr int w = width<S>;
    const S scale = S(p.options.scale), cap = S(p.options.softcap), steep = steepness(b, h);
    if (p.bias) load_pairs(p.bias, b, h, i, j0, n, scratch);
    for (int64_t j = 0; j < n; j += w) {
      vec<S> x = load(s + j) * scale;
      if (cap > 0) {
        const vec<S> t = tanh(x / cap);
        x = cap * t;
        if (slope != nullptr) store(slope + j, S(1) - t * t);
      }
      if (p.bias) x += load(scratch + j);
      if (p.alibi_slopes) x -= steep * distance(sequence, i, j0 + j);
      store(s + j, x);
    }
    if (!p.distance_bias) return;
    load_distances(sequence, b, h, i, j0, n, scratch);
    for (int64_t j = 0; j < n; j += w) store(s + j, load(s + j) + load(scratch + j));
  }

  // n elements of a bias, or of its tangent, from key j0 on in the row of query i.
  static void load_pairs(const TensorView& x, int64_t b, int64_t h, int64_t i, int64_t j0,
                         int64_t n, S* row) {
    const int64_t stride = x.stride[3], wide = round_up(n, width<S>);
    with_float_type<S>(
        x.dtype, [&]<class B>(B) { load_row(x.at<const B>(b, h, i, j0), stride, n, row, wide); });
  }

  // keep[j − j0] = whether the weight of query i and key j survives dropout, for n keys from j0 on,
  // rounded up to dropout_step; j0 is a multiple of 4.
  void keep(int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n, uint8_t* keep) const {
    keep_mask(dropout, RowCounter{uint32_t(i), uint32_t(h), uint32_t(b)}, j0, n, keep);
  }

  // How far keys j, j + 1, … are from the diagonal of ALiBi in the row of query i.
  FUSEDATTN_MEMBER static vec<S> distance(const Sequence<int64_t>& sequence, int64_t i, int64_t j) {
    const vec<S> x = S(i + sequence.offset - j) - counted<S>();
    return x < S(0) ? -x : x;
  }

  // −inf for the first n columns: what lies before the window of the row.
  FUSEDATTN_MEMBER static void hide(S* s, int64_t n) {
    for (int64_t j = 0; j < n; ++j) s[j] = -infinity<S>;
  }

  // A row relative to `origin`, and no more than `most` above it: then factor · s is the exponent.
  void rebase(S* s, int64_t n, S origin, S most = infinity<S>) const {
    const S back = S(log2e) / factor;
    for (int64_t j = 0; j < n; j += width<S>) {
      const vec<S> above = rounded(load(s + j) * unit) - origin;
      store(s + j, (above > most ? splat(most) : above) * back);
    }
  }

 private:
  FUSEDATTN_MEMBER S steepness(int64_t b, int64_t h) const {
    return p.alibi_slopes ? *p.alibi_slopes.at<const S>(b, h, 0) : S(0);
  }

  void load_distances(const Sequence<int64_t>& sequence, int64_t b, int64_t h, int64_t i,
                      int64_t j0, int64_t n, S* row) const {
    const TensorView& x = p.distance_bias;
    const int64_t zero = p.longest_k() - 1 - sequence.offset;
    load_row(x.at<const S>(b, h, 0, j0 - i + zero), x.stride[3], n, row, round_up(n, width<S>));
  }
};

// The lengths of sequences: memory has room for the longest, whatever the tensors hold.
struct Lengths {
  int64_t q = 0, k = 0;         // of the longest
  int64_t queries = 0;          // of all sequences
  double scores = 0, most = 0;  // pairs of query and key: of all, of the largest sequence

  // Of those sequences of which counts(number of queries).
  template <class Counts>
  FUSEDATTN_MEMBER Lengths(const AttentionForward& f, const Counts& counts) {
    if (!f.cu_seqlens_q) {
      if (counts(f.longest_q())) add(f.longest_q(), f.longest_k(), f.batch());
      return;
    }
    for (int64_t b = 0; b < f.sequences(); ++b) {
      const Sequence<int64_t> sequence = f.sequence(b);
      if (counts(sequence.seq_q)) add(sequence.seq_q, sequence.seq_k, 1);
    }
  }

 private:
  FUSEDATTN_MEMBER void add(int64_t seq_q, int64_t seq_k, int64_t times) {
    const double pairs = double(seq_q) * double(seq_k);
    q = larger(q, seq_q);
    k = larger(k, seq_k);
    queries += times * seq_q;
    scores += double(times) * pairs;
    most = pairs > most ? pairs : most;
  }
};

FUSEDATTN_INLINE int threads_for(const AttentionForward& f, const Lengths& lengths) {
  const double work = lengths.scores * f.heads() * (f.head_dim() + f.head_dim_v());
  return threads_if(work >= 1e5);
}

// Whether each thread takes whole (batch, key head) pairs, packs them for itself and meets the
// others only at the end; else all threads share the work on one pair after another. Pairs of
// unequal lengths count as so many of the largest.
FUSEDATTN_INLINE bool pairs_apart(const AttentionForward& f, const Lengths& lengths, int threads,
                                  int64_t bytes_of_pair) {
  constexpr int64_t most_bytes = int64_t{48} << 20;
  const int64_t pairs = f.sequences() * f.heads_kv();
  const double whole = lengths.scores * f.heads_kv();
  const bool even = f.heads_kv() % threads == 0 || (!f.cu_seqlens_q && pairs % threads == 0);
  return (even || whole >= 8.0 * threads * lengths.most) && threads * bytes_of_pair <= most_bytes;
}

// Rows from `first` on.
template <class T>
static void fill_rows(const TensorView& x, int64_t first, float value) {
  for (int64_t h = 0; h < x.shape[1]; ++h)
    for (int64_t i = first; i < x.shape[2]; ++i)
      for (int64_t c = 0; c < x.shape[3]; ++c) put(x.at<T>(0, h, i, c), value);
}

// Rows past the last packed sequence: out 0 and lse, or tangents of these.
template <class T>
static void fill_rest(const AttentionForward& f, const TensorView& out, const TensorView& lse,
                      float of_lse) {
  if (!f.cu_seqlens_q) return;
  const int64_t end = f.packed_q(f.sequences());
  fill_rows<T>(out, end, 0);
  fill_rows<compute_t<T>>(lse, end, of_lse);
}

}  // namespace fusedattn::FUSEDATTN_ISA
