// The words of a softmax over rows that lie along memory: unrolled loops, parts of a vector.
#pragma once

#include "softmax_scores.h"

namespace fusedattn::FUSEDATTN_ISA {
namespace {

constexpr int unroll = 4;  // independent chains, for the latency of additions and maxima

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

template <class V>
FUSEDATTN_INLINE V sum_of(const V (&x)[unroll]) {
  return (x[0] + x[1]) + (x[2] + x[3]);
}

}  // namespace
}  // namespace fusedattn::FUSEDATTN_ISA
