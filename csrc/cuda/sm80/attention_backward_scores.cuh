// From a warp's scores to probabilities and gradients of scores, in registers; the maths stands in
// attention_backward.cuh.
#pragma once

#include "attention_backward_scale.cuh"
#include "attention_scores.cuh"

namespace fusedattn::cuda {

// A warp's scores as fragments: keys × queries (`transposed`) or queries × keys. A lane has two
// queries of a fragment; `terms(q)` gives its pair for those of fragments q, asked for where it is
// used: all pairs at once cost registers.
template <bool transposed, int m, int n>
struct ScoresOf {
  using Fragments = Pack<float, 4>[m][n];

  // Scores to probabilities.
  template <class Terms>
  FUSEDATTN_DEVICE static void exponentiate(Fragments& s, float scale_log2, const Terms& terms) {
#pragma unroll
    for (int q = 0; q < queries; ++q) {
      const Pack<float, 2> shift = terms(q);
#pragma unroll
      for (int k = 0; k < keys; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          at(s, q, k)[e] = exp2(fma(at(s, q, k)[e], scale_log2, -shift[query_of(e)]));
    }
  }

  // Zeros where a key is hidden; the scores begin at `query` and `key`.
  FUSEDATTN_DEVICE static void hide(Fragments& s, const Sequence<int, false>& sequence, int query,
                                    int key) {
    constexpr int query_step = transposed ? 8 : 16, key_step = transposed ? 16 : 8;
    query += transposed ? column_of(0) : row_of(0);
    key += transposed ? row_of(0) : column_of(0);
#pragma unroll
    for (int q = 0; q < queries; ++q)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int down = e / 2 * 8, right = e % 2;
        const int end = sequence.end(query + q * query_step + (transposed ? right : down));
        const int seen = end - key - (transposed ? down : right);
#pragma unroll
        for (int k = 0; k < keys; ++k)
          if (k * key_step >= seen) at(s, q, k)[e] = 0.0f;
      }
  }

  // dp to e · ds, with `scale` = e.
  template <class T, class Terms>
  FUSEDATTN_DEVICE static void differentiate(Fragments& dp, const Fragments& p, float scale,
                                             const Terms& terms) {
#pragma unroll
    for (int q = 0; q < queries; ++q) {
      const Pack<float, 2> delta = terms(q);
#pragma unroll
      for (int k = 0; k < keys; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          at(dp, q, k)[e] =
              at(p, q, k)[e] * less_delta<T>(at(dp, q, k)[e], delta[query_of(e)], scale);
    }
  }

  // ds to the gradient of scale · raw; `terms` as for `exponentiate`.
  template <class Terms>
  FUSEDATTN_DEVICE static void chain(Fragments& ds, const Fragments& p, const Rules& rules,
                                     const Terms& terms) {
    if (!rules.bends()) return;
#pragma unroll
    for (int q = 0; q < queries; ++q) {
      const Pack<float, 2> shift = terms(q);
#pragma unroll
      for (int k = 0; k < keys; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          at(ds, q, k)[e] *= rules.slope(at(p, q, k)[e], shift[query_of(e)]);
    }
  }

  // Every option at once: raw scores s to what dropout leaves of the probabilities, dp to e times
  // the gradient of scale · raw. `taken(q, k, ds, i, j)` gets e times that of the scores, of
  // fragments of queries i and keys j.
  template <class T, class Shifts, class Deltas, class Taken>
  FUSEDATTN_DEVICE static void differentiate(Fragments& s, Fragments& dp, const Rules& rules,
                                             const HeadScores<T>& scores, int query, int key,
                                             bool masked, float scale, const Shifts& shifts,
                                             const Deltas& deltas, const Taken& taken) {
    constexpr int query_width = transposed ? 8 : 16, key_width = transposed ? 16 : 8;
    query += transposed ? column_of(0) : row_of(0);
    key += transposed ? row_of(0) : column_of(0);
#pragma unroll
    for (int q = 0; q < queries; ++q) {
      const Pack<float, 2> shift = shifts(q), delta = deltas(q);
#pragma unroll
      for (int k = 0; k < keys; ++k) {
        const int i = query + q * query_width, j = key + k * key_width;
        Pack<float, 4>&x = at(s, q, k), &dx = at(dp, q, k), slope, ds;
        scores.template apply<transposed>(x, i, j, slope);
        const uint32_t kept = rules.drops ? scores.template kept<transposed>(i, j) : 15;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool drop = !(kept >> e & 1);
          float weight = exp2((x[e] - shift[query_of(e)]) * log2_e);
          if (masked && scores.hidden(i + query_step<transposed>(e), j + key_step<transposed>(e)))
            weight = 0.0f;
          const float gradient = drop ? 0.0f : dx[e] * rules.keep_scale;
          ds[e] = weight * less_delta<T>(gradient, delta[query_of(e)], scale);
          x[e] = drop ? 0.0f : weight;
          dx[e] = ds[e] * slope[e];
        }
        taken(q, k, ds, i, j);
      }
    }
  }

 private:
  static constexpr int queries = transposed ? n : m, keys = transposed ? m : n;  // fragments

  template <class Any>
  FUSEDATTN_DEVICE static auto& at(Any& s, int q, int k) {
    return transposed ? s[k][q] : s[q][k];
  }
  FUSEDATTN_DEVICE static int query_of(int e) { return transposed ? e % 2 : e / 2; }
};

}  // namespace fusedattn::cuda
