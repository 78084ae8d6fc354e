// bf16 on the dot-product instruction of AVX512-BF16: pairs along k, accumulated in float.
#pragma once

#include "gemm.h"

namespace fusedattn::FUSEDATTN_ISA {

// [x0 … x15, y0 … y15], rounded to bf16.
FUSEDATTN_INLINE __m512i to_bf16(vec<float> x, vec<float> y) {
  return (__m512i)_mm512_cvtne2ps_pbh(y, x);
}

// (x0, y0), (x1, y1), …: one unit per column.
FUSEDATTN_INLINE __m512i interleave(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

struct Bf16Dot {
  typedef float Stat;
  typedef uint32_t Unit;
  typedef NoScope Scope;
  static constexpr int planes = 1;
  static constexpr int per_unit = 2;
  static constexpr int depth_step = 2;
  static constexpr int row_step = 1;
  static constexpr int vectors = 4;
  static constexpr int panel = vectors * width<float>;
  static constexpr bool overlaps = false;
  static constexpr int exp2_degree = 4;

  FUSEDATTN_INLINE __m512i broadcast(const uint32_t* a) { return _mm512_set1_epi32(int(*a)); }
  FUSEDATTN_INLINE __m512i fetch(const uint32_t* b) { return _mm512_loadu_si512(b); }
  FUSEDATTN_INLINE vec<float> multiply_add(vec<float> c, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }

  FUSEDATTN_INLINE void put_along(Rows<Unit> a, int64_t i, int64_t j, vec<float> x, vec<float> y) {
    _mm512_storeu_si512(a.data + i * a.ld + j / 2, to_bf16(x, y));
  }

  FUSEDATTN_INLINE void put_across(Panels<Unit> b, int64_t k, int64_t j, vec<float> x,
                                   vec<float> y) {
    _mm512_storeu_si512(b.data + (j / panel * b.depth + k / 2) * panel + j % panel,
                        interleave(to_bf16(x, y)));
  }

  static void multiply(int64_t m, int64_t n, int64_t k, Rows<Unit> a, Panels<Unit> b, float* c,
                       int64_t ldc, bool accumulate) {
    multiply_vectors<Bf16Dot>(m, n, k, a, b, c, ldc, accumulate);
  }
};

}  // namespace fusedattn::FUSEDATTN_ISA
