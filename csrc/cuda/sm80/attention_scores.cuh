// What makes scores of the products q · kᵀ, and takes a score's gradient back to its product:
//
//   score = softcap · tanh(scale · raw / softcap) + bias − slope · distance
//   d raw = scale · d score · (1 − tanh²(scale · raw / softcap))
//
// without softcap scale · raw and scale · d score; and what weights become by dropout.
//
// There are two ways to it. `Rules` alone serve scores that are the product times a number, or a
// softcap of that: the scale goes into the exponents, `factor`, and into dq and dk at their end.
// `HeadScores` serve kernels that are `ruled`, which take every option: scores are in natural
// units, for a bias of −FLT_MAX has no logarithm to base 2, and an exponent is (score − shift) ·
// log₂e.
#pragma once

#include <cmath>

#include "attention_common.cuh"
#include "cuda/dropout.cuh"

namespace fusedattn::cuda {

struct Rules {
  float factor;      // from what `apply` leaves to log2 units
  float inner, cap;  // scale / softcap, softcap; 0 without one
  float per_log2;    // from log2 units to scores over the softcap
  float scale;
  float keep_scale;       // of a weight that is not dropped
  uint32_t last_dropped;  // words up to this one drop a weight, where `drops`
  bool drops;

  Rules() = default;
  explicit Rules(const AttentionOptions& options)
      : factor(float(options.softcap > 0 ? 1.0 : options.scale) * log2_e),
        inner(options.softcap > 0 ? float(options.scale / options.softcap) : 0.0f),
        cap(float(options.softcap)),
        per_log2(float(options.softcap > 0 ? 1.0 / options.softcap : 0.0) / log2_e),
        scale(float(options.scale)),
        keep_scale(options.dropout_p < 1.0 ? float(1.0 / (1.0 - options.dropout_p)) : 0.0f),
        last_dropped(uint32_t(uint64_t(options.dropout_p * 0x1p32) - 1)),
        drops(uint64_t(options.dropout_p * 0x1p32) != 0) {}

  // Raw scores to scores, but for the factor.
  template <int m, int n>
  FUSEDATTN_DEVICE void apply(Pack<float, 4> (&s)[m][n]) const {
    if (!bends()) return;
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
      for (int j = 0; j < n; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][j][e] = cap * tanh(s[i][j][e] * inner);
  }

  // Whether a score is not the product times a factor.
  FUSEDATTN_DEVICE bool bends() const { return cap != 0.0f; }

  // d score / d (scale · raw) of a score that has the weight p = exp2(score · factor − shift); 0
  // where p is.
  FUSEDATTN_DEVICE float slope(float p, float shift) const {
    const float t = (log2(p) + shift) * per_log2;
    return p > 0.0f ? fma(-t, t, 1.0f) : 0.0f;
  }

  // A polynomial where |x| is small (Cephes' tanhf), else by exp(2 |x|).
  FUSEDATTN_DEVICE static float tanh(float x) {
    const float u = x * x, size = ::fabsf(x);
    float near = -5.70498872745e-3f;
    near = fma(near, u, 2.06390887954e-2f);
    near = fma(near, u, -5.37397155531e-2f);
    near = fma(near, u, 1.33314422036e-1f);
    near = fma(near, u, -3.33332819422e-1f);
    near = fma(near * u, x, x);
    // 2 / (exp(2 |x|) + 1) by a logarithm: a division would call a function, and cost registers.
    const float far = 1.0f - exp2(1.0f - log2(exp2(size * (2.0f * log2_e)) + 1.0f));
    return size > 0.625f ? ::copysignf(far, x) : near;  // NaN is near
  }
};

// Query and key of element e of a fragment, less those of its first one: fragments are queries ×
// keys, or `transposed`.
template <bool transposed>
FUSEDATTN_DEVICE constexpr int query_step(int e) {
  return transposed ? e % 2 : e / 2 * 8;
}
template <bool transposed>
FUSEDATTN_DEVICE constexpr int key_step(int e) {
  return query_step<!transposed>(e);
}

// The scores of one head of a sequence, by the fragment; T is the dtype of q.
template <class T>
class HeadScores {
 public:
  // b: the number of the sequence.
  FUSEDATTN_DEVICE HeadScores(const AttentionForward& p, const Rules& rules,
                              const Sequence<int>& sequence, int b, int h)
      : p_(p), rules_(rules), sequence_(sequence), b_(b), h_(h) {
    if (present(p.alibi_slopes)) steepness_ = load(p.alibi_slopes.at<float>(b, h));
    if (rules.drops) seed_ = uint64_t(load(static_cast<const int64_t*>(p.seed.data)));
  }

  // Raw products to scores, and `slope` to d score / d (scale · raw). i, j: query and key of the
  // fragment's first element.
  template <bool transposed>
  FUSEDATTN_DEVICE void apply(Pack<float, 4>& s, int i, int j, Pack<float, 4>& slope) const {
    slope = {1.0f, 1.0f, 1.0f, 1.0f};
    if (rules_.bends()) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float t = Rules::tanh(s[e] * rules_.inner);
        slope[e] = fma(-t, t, 1.0f);
        s[e] = rules_.cap * t;
      }
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[e] *= rules_.scale;
    }
    if (present(p_.bias)) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        s[e] += bias(i + query_step<transposed>(e), j + key_step<transposed>(e));
    }
    if (present(p_.alibi_slopes)) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        s[e] = fma(-steepness_,
                   distance(i + query_step<transposed>(e), j + key_step<transposed>(e)), s[e]);
    }
  }

  // How far a key is from the diagonal of ALiBi.
  FUSEDATTN_DEVICE float distance(int i, int j) const {
    return ::fabsf(float(i + sequence_.offset - j));
  }

  FUSEDATTN_DEVICE bool hidden(int i, int j) const {
    return j < sequence_.begin(i) || j >= sequence_.end(i);
  }

  // Whether dropout leaves the elements of a fragment: bit e. By all lanes of a warp; i and j are
  // a lane's own, of which a warp's first key is a multiple of 8.
  template <bool transposed>
  FUSEDATTN_DEVICE uint32_t kept(int i, int j) const {
    // A counter gives the words of a query's keys 4 n … 4 n + 3. A fragment has 64 of them for its
    // 256 elements: each lane makes those of one, and they are exchanged.
    Pack<uint32_t, 4> words;
    if constexpr (transposed) {
      const int rank = lane() / 4 % 4;
      words = counter(i + rank % 2, j + rank / 2 * 8);
      exchange(words, rank, 1);
      exchange(words, rank, 2);
    } else {
      const int rank = lane() % 2;
      words = counter(i + rank * 8, j);
      const uint32_t low = shuffle_xor(rank == 0 ? words[2] : words[0], 1);
      const uint32_t high = shuffle_xor(rank == 0 ? words[3] : words[1], 1);
      if (rank == 0)
        words[2] = low, words[3] = high;
      else
        words[0] = low, words[1] = high;
    }
    uint32_t bits = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) bits |= uint32_t(words[e] > rules_.last_dropped) << e;
    return bits;
  }

 private:
  FUSEDATTN_DEVICE float bias(int i, int j) const {
    if (!below(i, sequence_.seq_q) || !below(j, sequence_.seq_k)) return 0.0f;
    if (p_.bias.dtype == DType::f32) return load(p_.bias.at<float>(b_, h_, i, j));
    return to_float(load(p_.bias.at<T>(b_, h_, i, j)));
  }

  FUSEDATTN_DEVICE Pack<uint32_t, 4> counter(int i, int j) const {
    return philox(seed_, uint32_t(j) / 4, uint32_t(i), uint32_t(h_), uint32_t(b_));
  }

  // A step of the transposition of four lanes' words: 4 · bit lanes apart.
  FUSEDATTN_DEVICE static void exchange(Pack<uint32_t, 4>& words, int rank, int bit) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c & bit) continue;
      const bool upper = rank & bit;
      const uint32_t other = shuffle_xor(upper ? words[c] : words[c + bit], 4 * bit);
      if (upper)
        words[c] = other;
      else
        words[c + bit] = other;
    }
  }

  const AttentionForward& p_;
  const Rules& rules_;
  const Sequence<int>& sequence_;
  int b_, h_;
  float steepness_ = 0.0f;
  uint64_t seed_ = 0;
};

// Takes a sink into `total`, a row's sum of exponentials relative to `highest`; returns what other
// such sums are multiplied by.
FUSEDATTN_DEVICE float add_sink(float& highest, float& total, float sink) {
  const float before = highest;
  highest = ::fmaxf(before, sink);
  const float factor = exp2((before - highest) * log2_e);
  total = fma(total, factor, exp2((sink - highest) * log2_e));
  return factor;
}

}  // namespace fusedattn::cuda
