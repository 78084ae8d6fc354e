// What makes scores of the products q · kᵀ, and takes a score's gradient back to its product:
//
//   score = softcap · tanh(scale · raw / softcap), without softcap scale · raw
//   d raw = scale · d score · (1 − (score / softcap)²)
//
// Without a softcap the scale goes into the exponents, `factor`, and into dq and dk at their end.
#pragma once

#include <cmath>

#include "attention_common.cuh"

namespace fusedattn::cuda {

struct Rules {
  float factor;      // from what `apply` leaves to log2 units
  float inner, cap;  // scale / softcap, softcap; 0 without one
  float per_log2;    // from log2 units to scores over the softcap

  Rules() = default;
  explicit Rules(const AttentionOptions& options)
      : factor(float(options.softcap > 0 ? 1.0 : options.scale) * log2_e),
        inner(options.softcap > 0 ? float(options.scale / options.softcap) : 0.0f),
        cap(float(options.softcap)),
        per_log2(float(options.softcap > 0 ? 1.0 / options.softcap : 0.0) / log2_e) {}

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

 private:
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

}  // namespace fusedattn::cuda
