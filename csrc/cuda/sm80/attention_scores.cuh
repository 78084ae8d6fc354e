// What makes scores of the products q · kᵀ, and takes a score's gradient back to its product:
//
//   score = scale · raw     d raw = scale · d score
//
// The scale goes into the exponents, `factor`, and into dq and dk at their end.
#pragma once

#include <cmath>

#include "attention_common.cuh"

namespace fusedattn::cuda {

struct Rules {
  float factor;  // from what `apply` leaves to log2 units

  Rules() = default;
  explicit Rules(const AttentionOptions& options) : factor(float(options.scale) * log2_e) {}

  // Raw scores to scores, but for the factor.
  template <int m, int n>
  FUSEDATTN_DEVICE void apply(Pack<float, 4> (&)[m][n]) const {}

  // Whether a score is not the product times a factor.
  FUSEDATTN_DEVICE bool bends() const { return false; }

  // d score / d (scale · raw) of a score that has the weight p = exp2(score · factor − shift).
  FUSEDATTN_DEVICE float slope(float, float) const { return 1.0f; }
};

}  // namespace fusedattn::cuda
