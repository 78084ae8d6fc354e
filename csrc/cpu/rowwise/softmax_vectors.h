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

// A vector of which the first lanes exist; the others are `rest`, and nothing there is touched.
template <class T, class S = compute_t<T>>
FUSEDATTN_INLINE vec<S> load_some(const T* p, Whole, S) {
  return load_as(p);
}

template <class T, class S = compute_t<T>>
FUSEDATTN_INLINE void store_some(T* p, Whole, vec<S> x) {
  store_as(p, x);
}

template <class T, class S = compute_t<T>>
FUSEDATTN_INLINE vec<S> load_some(const T* p, int64_t left, S rest) {
  T lanes[width<S>] = {};
  memcpy(lanes, p, left * sizeof(T));
  return select_below(int(left), load_as(lanes), splat(rest));
}

template <class T, class S = compute_t<T>>
FUSEDATTN_INLINE void store_some(T* p, int64_t left, vec<S> x) {
  T lanes[width<S>];
  store_as(lanes, x);
  memcpy(p, lanes, left * sizeof(T));
}

#if defined(__AVX512F__)
// The same by masked moves, for rows of few vectors.
FUSEDATTN_INLINE vec<float> load_some(const float* p, int64_t left, float rest) {
  return _mm512_mask_loadu_ps(splat(rest), __mmask16((1u << left) - 1), p);
}

FUSEDATTN_INLINE vec<float> load_some(const bf16* p, int64_t left, float rest) {
  const __mmask16 lanes = __mmask16((1u << left) - 1);
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
  return _mm512_mask_blend_ps(lanes, splat(rest), (vec<float>)_mm512_slli_epi32(bits, 16));
}

FUSEDATTN_INLINE void store_some(float* p, int64_t left, vec<float> x) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << left) - 1), x);
}

FUSEDATTN_INLINE void store_some(bf16* p, int64_t left, vec<float> x) {
  alignas(32) bf16 lanes[width<float>];
  store_as(lanes, x);
  const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
  _mm256_mask_storeu_epi16(p, __mmask16((1u << left) - 1), bits);
}
#endif

template <class V>
FUSEDATTN_INLINE V sum_of(const V (&x)[unroll]) {
  return (x[0] + x[1]) + (x[2] + x[3]);
}

}  // namespace
}  // namespace fusedattn::FUSEDATTN_ISA
