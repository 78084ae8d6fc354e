// The moments of a chunk of a row: mean and sum of squared deviations in one pass, with a second
// where the first cannot be precise.
#pragma once

#include "norm_rows.h"

namespace fusedattn::FUSEDATTN_ISA {

// Mean and Σ (x − mean)² of a chunk; for RMS norm 0 and Σ x².
struct Moments {
  double mean, squares;
};

// Σ d, or 0 without a centre, and Σ d² with d = x − centre.
struct Sums {
  double first, second;
};

// The same on their way: several additions are in flight.
template <bool Centre, class S>
struct SumsInVectors {
  static constexpr int ways = 4;
  vec<S> first[ways] = {}, second[ways] = {};

  FUSEDATTN_MEMBER void add(int way, vec<S> d) {
    if constexpr (Centre) first[way] += d;
    second[way] += d * d;
  }
  FUSEDATTN_MEMBER Sums total() const {
    return {Centre ? reduce_add((first[0] + first[1]) + (first[2] + first[3])) : S(0),
            reduce_add((second[0] + second[1]) + (second[2] + second[3]))};
  }
};

// Those of scale · x. The order of the elements is free, so pairs of vectors are read as is
// cheapest.
template <bool Centre, class S, class P>
static Sums deviations(const P* x, int64_t n, S scale, S centre, bool ahead) {
  SumsInVectors<Centre, S> sums;
  constexpr int w = width<S>, ways = sums.ways;
  int64_t i = 0;
  for (; i + ways * w <= n; i += ways * w) {
    if (ahead) [[unlikely]]
      fetch_ahead(x + i, ways * w);
#pragma GCC unroll 2
    for (int k = 0; k < ways; k += 2) {
      vec<S> d[2];
      get_pair<S>(x + i + k * w, d[0], d[1]);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) sums.add(k + j, d[j] * scale - centre);
    }
  }
  for_vectors<S>(n - i, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
    sums.add(0, zero_past(get<S>(x + i + j, lanes) * scale - centre, lanes));
  });
  return sums.total();
}

// What the sums over n elements tell of their moments.
struct Deviations {
  Sums sums;
  double centre;
  int64_t n;

  double correction() const { return sums.first * sums.first / double(n); }
  // Else the centre is so far from the mean that the squares lose more than a digit of two.
  bool precise() const { return correction() <= sums.second / 2; }
  double mean() const { return centre + sums.first / double(n); }
  Moments moments() const {
    const double squares = sums.second - correction();
    return {mean(), squares < 0 ? 0 : squares};
  }
};

// The mean of the first of n elements value(i, lanes), which stands in for that of all.
template <class S, class Value>
FUSEDATTN_INLINE S mean_of_first(int64_t n, const Value& value) {
  const int64_t few = n < 4 * width<S> ? n : 4 * width<S>;
  vec<S> sum{};
  for_vectors<S>(
      few, [&](int64_t i, auto lanes) __attribute__((always_inline)) { sum += value(i, lanes); });
  return reduce_add(sum) / S(few);
}

// Two passes in one, and another where the first elements do not tell enough of the rest.
template <class S, class P>
static Moments centred_moments(const P* x, int64_t n, S scale, bool ahead) {
  const auto value = [&](int64_t i, auto lanes) { return get<S>(x + i, lanes) * scale; };
  const S centre = mean_of_first<S>(n, value);
  const Deviations d{deviations<true>(x, n, scale, centre, ahead), centre, n};
  if (d.precise()) return d.moments();
  const S mean = S(d.mean());
  return Deviations{deviations<true>(x, n, scale, mean, false), mean, n}.moments();
}

#if defined(__AVX512BF16__)
// Σ x, where there is a centre, and Σ x² by the dot product of pairs.
template <bool Centre>
FUSEDATTN_INLINE Sums plain_sums(const bf16* x, int64_t n, bool ahead) {
  SumsInVectors<Centre, float> sums;
  constexpr int w = width<float>, ways = sums.ways;
  int64_t i = 0;
  for (; i + 2 * ways * w <= n; i += 2 * ways * w) {
    if (ahead) [[unlikely]]
      fetch_ahead(x + i, 2 * ways * w);
#pragma GCC unroll 4
    for (int k = 0; k < ways; ++k)
      add_squares_and_sums<Centre>(x + i + 2 * k * w, sums.second[k], sums.first[k]);
  }
  for_vectors<float>(n - i,
                     [&](int64_t j, auto lanes) { sums.add(0, get<float>(x + i + j, lanes)); });
  return sums.total();
}
#endif

// The moments of a chunk of scale · x; without a centre 0 and Σ x². `ahead`: x comes from memory.
template <class S, class P>
FUSEDATTN_INLINE Moments moments_of(const P* x, int64_t n, S scale, bool centre, bool ahead) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<P, bf16>) {
    if (scale == S(1)) {
      if (!centre) return {0, plain_sums<false>(x, n, ahead).second};
      const double share = 1 / double(n);  // while the sums are on their way
      const auto [sum, squares] = plain_sums<true>(x, n, ahead);
      // At most five bits of 24 are lost; a result has eight.
      const double mean = sum * share, about_mean = squares - sum * mean;
      if (about_mean * 32 >= squares) return {mean, about_mean};
    }
  }
#endif
  if (centre) return centred_moments<S>(x, n, scale, ahead);
  return {0, deviations<false>(x, n, scale, S(0), ahead).second};
}

}  // namespace fusedattn::FUSEDATTN_ISA
