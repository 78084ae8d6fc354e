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

// The same on their way: several additions are in flight, for `in_short_sums`.
template <bool Centre, class S>
struct SumsInVectors {
  static constexpr int ways = 4;
  vec<S> first[ways] = {}, second[ways] = {}, first_total = {}, second_total = {};

  FUSEDATTN_MEMBER void add(int way, vec<S> d) {
    if constexpr (Centre) first[way] += d;
    second[way] += d * d;
  }
  FUSEDATTN_MEMBER void flush() {
    if constexpr (Centre) first_total += (first[0] + first[1]) + (first[2] + first[3]);
    second_total += (second[0] + second[1]) + (second[2] + second[3]);
#pragma GCC unroll 4
    for (int way = 0; way < ways; ++way) first[way] = second[way] = vec<S>{};
  }
  FUSEDATTN_MEMBER Sums total() {
    flush();
    return {Centre ? reduce_add(first_total) : S(0), reduce_add(second_total)};
  }
};

// Those of scale · x − centre, block by block. The order of the elements is free, so pairs of
// vectors are read as is cheapest.
template <bool Centre, class S, class P>
struct SumsOfDeviations {
  static constexpr int w = width<S>, ways = SumsInVectors<Centre, S>::ways, block = ways * w;
  S scale, centre;
  SumsInVectors<Centre, S> sums = {};

  FUSEDATTN_MEMBER void add(const P* x) {
#pragma GCC unroll 2
    for (int k = 0; k < ways; k += 2) {
      vec<S> d[2];
      get_pair<S>(x + k * w, d[0], d[1]);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) sums.add(k + j, d[j] * scale - centre);
    }
  }
  FUSEDATTN_MEMBER Sums total(const P* rest, int64_t n) {
    for_vectors<S>(n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      sums.add(0, zero_past(get<S>(rest + i, lanes) * scale - centre, lanes));
    });
    return sums.total();
  }
};

// Σ x, where there is a centre, and Σ x²: squares of bf16 are exact.
template <bool Centre>
struct PlainSums {
  static constexpr int w = width<float>, ways = SumsInVectors<Centre, float>::ways,
                       block = 2 * ways * w;
  SumsInVectors<Centre, float> sums = {};

  FUSEDATTN_MEMBER void add(const bf16* x) {
#pragma GCC unroll 4
    for (int k = 0; k < ways; ++k) {
      vec<float> pair[2];
      get_pair<float>(x + 2 * k * w, pair[0], pair[1]);
      sums.add(k, pair[0]);
      sums.add(k, pair[1]);
    }
  }
  FUSEDATTN_MEMBER Sums total(const bf16* rest, int64_t n) {
    for_vectors<float>(n, [&](int64_t i, auto lanes) { sums.add(0, get<float>(rest + i, lanes)); });
    return sums.total();
  }
};

template <class Summing, class P>
FUSEDATTN_INLINE Sums sums_of(Summing summing, const P* x, int64_t n) {
  const int64_t i = in_short_sums<Summing::block>(
      n, [&](int64_t j) { summing.add(x + j); }, [&] { summing.sums.flush(); });
  return summing.total(x + i, n - i);
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

// The mean of the first of n elements value(i, lanes), which stands in for that of all; 0 where it
// is small beside them. Then zeros, which may be most of a row, add nothing: a small addend that
// comes again and again is rounded the same way each time.
template <class S, class Value>
FUSEDATTN_INLINE S mean_of_first(int64_t n, const Value& value) {
  constexpr int most = 4 * width<S>;
  const int64_t few = n < most ? n : most;
  vec<S> sum{}, squares{};
  for_vectors<S>(few, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const vec<S> x = value(i, lanes);
    sum += x;
    squares += x * x;
  });
  const S total = reduce_add(sum), mean = total * (n < most ? 1 / S(n) : S(1) / most);
  const S of_squares = reduce_add(squares);
  return 4 * total * mean <= of_squares && of_squares < infinity<S> ? S(0) : mean;
}

// From sums of deviations from a centre; another pass where it does not tell enough of the mean.
template <class S, class P>
FUSEDATTN_INLINE Moments moments_about(S centre, const Sums& sums, const P* x, int64_t n, S scale) {
  const Deviations d{sums, centre, n};
  if (d.precise()) return d.moments();
  const S mean = S(d.mean());
  return Deviations{sums_of(SumsOfDeviations<true, S, P>{scale, mean}, x, n), mean, n}.moments();
}

// Those of a chunk of scale · x; without a centre 0 and Σ x².
template <bool Centre, class S, class P>
static Moments scaled_moments(const P* x, int64_t n, S scale) {
  S centre = 0;
  if constexpr (Centre)
    centre =
        mean_of_first<S>(n, [&](int64_t i, auto lanes) { return get<S>(x + i, lanes) * scale; });
  const Sums sums = sums_of(SumsOfDeviations<Centre, S, P>{scale, centre}, x, n);
  if constexpr (!Centre) return {0, sums.second};
  return moments_about(centre, sums, x, n, scale);
}

// Those of a chunk of x, block by block, so that a loop with other work can take them along.
template <bool Centre, class S, class P>
class MomentsInBlocks {
  static constexpr bool plain = std::is_same_v<P, bf16>;
  typedef std::conditional_t<plain, PlainSums<Centre>, SumsOfDeviations<Centre, S, P>> Summing;
  const P* const x;
  const int64_t n;
  Summing summing;

 public:
  static constexpr int block = Summing::block;

  FUSEDATTN_MEMBER MomentsInBlocks(const P* x, int64_t n) : x(x), n(n) {
    if constexpr (!plain) {
      summing.scale = S(1);
      summing.centre = S(0);
      if constexpr (Centre)
        summing.centre =
            mean_of_first<S>(n, [&](int64_t i, auto lanes) { return get<S>(x + i, lanes); });
    }
  }
  // Takes the block at i.
  FUSEDATTN_MEMBER void add(int64_t i) { summing.add(x + i); }
  FUSEDATTN_MEMBER void flush() { summing.sums.flush(); }

  // With what is left from i on.
  FUSEDATTN_MEMBER Moments finish(int64_t i) {
    const double share = 1 / double(n);  // while the sums are on their way
    const Sums sums = summing.total(x + i, n - i);
    if constexpr (!Centre) {
      return {0, sums.second};
    } else if constexpr (plain) {
      // At most five bits of 24 are lost; a result has eight.
      const double mean = sums.first * share, about_mean = sums.second - sums.first * mean;
      if (about_mean * 32 >= sums.second) return {mean, about_mean};
      return scaled_moments<true>(x, n, S(1));
    } else {
      return moments_about(summing.centre, sums, x, n, S(1));
    }
  }
};

// Those of a chunk of x. `ahead`: it comes from memory.
template <bool Centre, class S, class P>
static Moments moments_of(const P* x, int64_t n, bool ahead) {
  MomentsInBlocks<Centre, S, P> moments(x, n);
  const auto add = [&](int64_t i) __attribute__((always_inline)) {
    if (ahead) [[unlikely]]
      fetch_ahead(x + i, moments.block, prefetch);
    moments.add(i);
  };
  return moments.finish(in_short_sums<moments.block>(n, add, [&] { moments.flush(); }));
}

}  // namespace fusedattn::FUSEDATTN_ISA
