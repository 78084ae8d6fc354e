// The words of a softmax over rows that lie along memory: loops over rows and over vectors.
#pragma once

#include "softmax_scores.h"

namespace fusedattn::FUSEDATTN_ISA {
namespace {

constexpr int64_t chunk = 8192;  // columns whose exponentials wait in L1 until their sum is known
constexpr int unroll = 4;        // independent chains, for the latency of additions and maxima

// row(where) for all rows. Causal rows grow, so threads take turns.
template <class Params, class Row>
FUSEDATTN_INLINE void for_rows(const Params& p, const Row& row) {
  const int64_t count = p.rows();
  const int64_t block = p.options.causal == SoftmaxCausal::none
                            ? ceil_div(count, omp_get_num_threads())
                            : int64_t(16);
#pragma omp for schedule(static, 1)
  for (int64_t first = 0; first < count; first += block) {
    Index at = index_of(p, first);
    for (int64_t r = first; r < smaller(first + block, count); ++r) {
      row(at);
      at.next(p);
    }
  }
}

// Calls step(v, j, left) for the vector at column j of n, of which `left` elements exist: all of
// them, known to the compiler, or fewer. v < unroll does not depend on n.
template <class S, class Step>
FUSEDATTN_INLINE void for_vectors(int64_t n, Step step) {
  constexpr int w = width<S>;
  int64_t j = 0;
  for (; j + unroll * w <= n; j += unroll * w) {
#pragma GCC unroll 4
    for (int v = 0; v < unroll; ++v) step(v, j + v * w, Whole{});
  }
#pragma GCC unroll 4
  for (int v = 0; v < unroll; ++v, j += w) {
    if (j + w <= n)
      step(v, j, Whole{});
    else if (j < n)
      step(v, j, n - j);
  }
}

// value(j, left) for the vectors of n elements, rounded, at to + j; fetch as in stream_vectors.
template <class T, class Value, class Fetch = FetchNothing>
FUSEDATTN_INLINE void write_values(T* to, int64_t n, bool streamed, const Value& value,
                                   const Fetch& fetch = {}) {
  typedef compute_t<T> S;
  constexpr int w = width<S>;
  int64_t i = streamed ? stream_vectors<S>(to, n, value, fetch) : 0;
  if constexpr (std::is_same_v<T, bf16>) {
    for (; i + 2 * w <= n; i += 2 * w) {
      fetch(i, 2 * w);
      set_pair<S>(to + i, value(i, Whole{}), value(i + w, Whole{}));
    }
  }
  for_vectors<S>(n - i, [=](int v, int64_t j, auto left) {
    if (v == 0) fetch(i + j, unroll * w);
    store_some(to + i + j, left, value(i + j, left));
  });
}

// How many elements later dout and out are fetched, if at all.
struct On {
  int64_t dout = 0, out = 0;
};

template <class V>
FUSEDATTN_INLINE V sum_of(const V (&x)[unroll]) {
  return (x[0] + x[1]) + (x[2] + x[3]);
}

// Σ value(v, j, left) over those vectors, a few at a time: see in_short_sums.
template <class S, class Value>
FUSEDATTN_INLINE S sum_of_vectors(int64_t n, const Value& value) {
  constexpr int64_t few = 16 * unroll * width<S>;
  vec<S> total{};
  for (int64_t first = 0; first < n; first += few) {
    vec<S> sums[unroll] = {};
    for_vectors<S>(smaller(n - first, few),
                   [&](int v, int64_t j, auto left) { sums[v] += value(v, first + j, left); });
    total += sum_of(sums);
  }
  return reduce_add(total);
}

template <class S>
FUSEDATTN_INLINE S finite_origin(S high) {
  return high == -infinity<S> ? S(0) : high;  // −inf − 0 still has the exponential 0
}

// factor · (x − origin)
template <class S>
FUSEDATTN_INLINE auto exponent_of(S origin, S factor) {
  return [=](vec<S> x) { return (x - origin) * factor; };
}

// f(such an exponent) for a whole row of T. In 16 bits one multiply-add serves: what rounding
// factor · origin loses is the same for all elements, and leaves with their sum, if it is small.
template <class T, class F, class S = compute_t<T>>
FUSEDATTN_INLINE auto with_exponent(S origin, S factor, F f) {
  if constexpr (sizeof(T) == 2) {
    const S shift = origin * factor;
    if (shift > S(-0x1p20) && shift < S(0x1p20)) [[likely]]
      return f([=](vec<S> x) { return x * factor - shift; });
  }
  return f(exponent_of(origin, factor));
}

template <class S>
FUSEDATTN_INLINE S reciprocal(S sum) {
  return sum == 0 ? S(0) : 1 / sum;
}

template <class T>
FUSEDATTN_INLINE compute_t<T> dot(const T* x, const T* y, int64_t n, bool ahead) {
  typedef compute_t<T> S;
  return sum_of_vectors<S>(n, [&](int v, int64_t j, auto left) {
    if (v == 0 && ahead) [[unlikely]] {
      fetch_ahead(x + j, unroll * width<S>, prefetch);
      fetch_ahead(y + j, unroll * width<S>, prefetch);
    }
    return load_some(x + j, left, S(0)) * load_some(y + j, left, S(0));
  });
}

#if defined(__AVX512BF16__)
// The same in products of pairs, which add to float.
FUSEDATTN_INLINE float dot(const bf16* x, const bf16* y, int64_t n, bool ahead) {
  constexpr int64_t pairs = 2 * width<float>;
  vec<float> sums[unroll] = {};
  const auto step = [&](int v, __m512i a, __m512i b) {
    sums[v] = _mm512_dpbf16_ps(sums[v], (__m512bh)a, (__m512bh)b);
  };
  int64_t j = 0;
  for (; j + unroll * pairs <= n; j += unroll * pairs) {
    if (ahead) [[unlikely]] {
      fetch_ahead(x + j, unroll * pairs, prefetch);
      fetch_ahead(y + j, unroll * pairs, prefetch);
    }
#pragma GCC unroll 4
    for (int v = 0; v < unroll; ++v)
      step(v, _mm512_loadu_si512(x + j + v * pairs), _mm512_loadu_si512(y + j + v * pairs));
  }
#pragma GCC unroll 4
  for (int v = 0; v < unroll; ++v, j += pairs) {
    if (j >= n) break;
    const __mmask32 lanes = n - j < pairs ? (__mmask32(1) << (n - j)) - 1 : ~__mmask32(0);
    step(v, _mm512_maskz_loadu_epi16(lanes, x + j), _mm512_maskz_loadu_epi16(lanes, y + j));
  }
  return reduce_add(sum_of(sums));
}
#endif

}  // namespace
}  // namespace fusedattn::FUSEDATTN_ISA
