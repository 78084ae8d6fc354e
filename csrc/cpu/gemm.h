// Small matrix products C[m][n] (+)= A[m][k] · B[k][n] on packed operands that stay in cache.
//
// An *engine* says how numbers are stored and multiplied. It packs `per_unit` consecutive elements
// along k into one unit (a float, a double, or a pair of bf16), and splits a number into `planes`
// parts whose products are added up. A is held as rows of units, B as panels of `panel` columns:
//
//     A: [plane][m][ld]                       rows of units along k
//     B: [plane][n / panel][k units][panel]   a row of a panel is one or more vectors
//
// The same two layouts serve all products of the forward and backward pass; pack.h fills them from
// tensors, and the engines' put_along / put_across fill them from scores in registers.
#pragma once

#include "vec.h"

namespace fusedattn::FUSEDATTN_ISA {

FUSEDATTN_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
FUSEDATTN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDATTN_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// What a thread must hold while an engine multiplies: nothing, for most.
struct NoScope {};

template <class Unit>
struct Rows {
  Unit* data;
  int64_t ld;     // units between rows
  int64_t plane;  // units between planes
  Rows from(int64_t row) const { return {data + row * ld, ld, plane}; }
};

template <class Unit>
struct Panels {
  Unit* data;
  int64_t depth;  // units of k that a panel has room for
  int64_t plane;
};

// C[m][n] (+)= A · B by broadcasts and vectors; columns in whole vectors, k a multiple of
// depth_step.
template <class E>
static void multiply_vectors(int64_t m, int64_t n, int64_t k, Rows<typename E::Unit> a,
                             Panels<typename E::Unit> b, typename E::Stat* c, int64_t ldc,
                             bool accumulate);

// Broadcast-and-multiply in S itself: every instruction set, every dtype.
template <class S>
struct Fma {
  typedef S Stat;
  typedef S Unit;
  typedef NoScope Scope;
  static constexpr int planes = 1;
  static constexpr int per_unit = 1;
  static constexpr int depth_step = 1;  // k is padded to a multiple of it, in elements
  static constexpr int row_step = 1;    // m likewise
  static constexpr int vectors = vector_registers == 32 ? 4 : 2;
  static constexpr int panel = vectors * width<S>;
  static constexpr bool overlaps = false;  // multiplies on units that vectors leave free
  static constexpr int exp2_degree = 6;

  FUSEDATTN_INLINE vec<S> broadcast(const S* a) { return splat(*a); }
  FUSEDATTN_INLINE vec<S> fetch(const S* b) { return load(b); }
  FUSEDATTN_INLINE vec<S> multiply_add(vec<S> c, vec<S> a, vec<S> b) { return c + a * b; }

  // Columns [j, j + 2·width) of row i of A.
  FUSEDATTN_INLINE void put_along(Rows<S> a, int64_t i, int64_t j, vec<S> x, vec<S> y) {
    store(a.data + i * a.ld + j, x);
    store(a.data + i * a.ld + j + width<S>, y);
  }

  // Columns [j, j + width) of rows k and k + 1 of B; k is even.
  FUSEDATTN_INLINE void put_across(Panels<S> b, int64_t k, int64_t j, vec<S> x, vec<S> y) {
    S* row = b.data + (j / panel * b.depth + k) * panel + j % panel;
    store(row, x);
    store(row + panel, y);
  }

  static void multiply(int64_t m, int64_t n, int64_t k, Rows<S> a, Panels<S> b, S* c, int64_t ldc,
                       bool accumulate) {
    multiply_vectors<Fma>(m, n, k, a, b, c, ldc, accumulate);
  }
};

template <class E>
using stat_of = typename E::Stat;
template <class E>
using unit_of = typename E::Unit;

// One register tile: `M` rows by `N` vectors of C. A value of A is broadcast once for N products,
// a vector of B loaded once for M; M·N independent chains hide the latency of the multiply-add.
template <class E, int M, int N>
FUSEDATTN_INLINE void multiply_tile(int64_t depth, const unit_of<E>* a, int64_t lda,
                                    const unit_of<E>* b, stat_of<E>* c, int64_t ldc,
                                    bool accumulate) {
  typedef stat_of<E> S;
  vec<S> sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[i][j] = vec<S>{};
  for (int64_t k = 0; k < depth; ++k, b += E::panel) {
    decltype(E::fetch(b)) column[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) column[j] = E::fetch(b + j * width<S>);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const auto row = E::broadcast(a + i * lda + k);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[i][j] = E::multiply_add(sum[i][j], row, column[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      S* const at = c + i * ldc + j * width<S>;
      store(at, accumulate ? load(at) + sum[i][j] : sum[i][j]);
    }
}

template <class E, int N>
static void multiply_panel(int64_t m, int64_t depth, const unit_of<E>* a, int64_t lda,
                           const unit_of<E>* b, stat_of<E>* c, int64_t ldc, bool accumulate) {
  int64_t i = 0;
  for (; i + 6 <= m; i += 6)
    multiply_tile<E, 6, N>(depth, a + i * lda, lda, b, c + i * ldc, ldc, accumulate);
  for (; i + 2 <= m; i += 2)
    multiply_tile<E, 2, N>(depth, a + i * lda, lda, b, c + i * ldc, ldc, accumulate);
  if (i < m) multiply_tile<E, 1, N>(depth, a + i * lda, lda, b, c + i * ldc, ldc, accumulate);
}

// A panel of B stays in the first-level cache while all rows of A pass over it.
template <class E>
static void multiply_vectors(int64_t m, int64_t n, int64_t k, Rows<typename E::Unit> a,
                             Panels<typename E::Unit> b, typename E::Stat* c, int64_t ldc,
                             bool accumulate) {
  constexpr int w = width<stat_of<E>>;
  const int64_t depth = k / E::per_unit;
  for (int64_t j = 0; j < n; j += E::panel) {
    const unit_of<E>* panel = b.data + j * b.depth;
    const int vectors = int((smaller(n - j, E::panel) + w - 1) / w);
    if (vectors == E::vectors) {
      multiply_panel<E, E::vectors>(m, depth, a.data, a.ld, panel, c + j, ldc, accumulate);
    } else {
      for (int v = 0; v < vectors; ++v)
        multiply_panel<E, 1>(m, depth, a.data, a.ld, panel + v * w, c + j + v * w, ldc, accumulate);
    }
  }
}

}  // namespace fusedattn::FUSEDATTN_ISA
