// From tensors to the packed operands of gemm.h, converting dtypes on the way. Each function
// returns whether the engine can multiply what it packed: one that splits numbers cannot take
// infinities (∞ · 0 of the parts would be NaN), nor needs it take NaN.
#pragma once

#include <utility>

#include "gemm.h"

namespace fusedattn::FUSEDATTN_ISA {

// Rows of a tensor: element (i, j) at data[i · row + j · column].
template <class T>
struct Source {
  const T* data;
  int64_t row, column;
  Source from(int64_t i) const { return {data + i * row, row, column}; }
  const T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

constexpr int chunk = 512;  // columns converted at a time

template <class V, int... I>
FUSEDATTN_INLINE void interleave_vectors(V x, V y, V& low, V& high,
                                         std::integer_sequence<int, I...>) {
  constexpr int half = sizeof...(I) / 2, n = sizeof...(I);
  low = __builtin_shufflevector(x, y, (I % 2 * n + I / 2)...);
  high = __builtin_shufflevector(x, y, (I % 2 * n + I / 2 + half)...);
}

// dst[j][i] = src[i][j] for a square of one vector's width: log2(width) perfect shuffles.
template <class Unit>
FUSEDATTN_INLINE void transpose_square(const Unit* src, int64_t ld_src, Unit* dst, int64_t ld_dst) {
  constexpr int n = vector_bytes / int(sizeof(Unit));
  typedef Unit V __attribute__((vector_size(vector_bytes)));
  V x[n], y[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) x[i] = load_bits<V>(src + i * ld_src);
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i)
      interleave_vectors(x[i], x[i + n / 2], y[2 * i], y[2 * i + 1],
                         std::make_integer_sequence<int, n>());
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) *reinterpret_cast<loose_bits*>(dst + i * ld_dst) = (loose_bits)x[i];
}

// In each 128-bit lane, or of the lanes themselves: every second one of x, then of y, from `first`.
template <int first, bool lanes, class V, int... I>
FUSEDATTN_INLINE V every_second(V x, V y, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I), lane = 16 * n / vector_bytes;
  constexpr int step = lanes ? lane : 1, period = lanes ? n : lane;
  constexpr auto from = [](int i) {
    const int p = i % period / step, half = period / step / 2;
    return i / period * period + (2 * (p % half) + first) * step + i % step + p / half * n;
  };
  return __builtin_shufflevector(x, y, from(I)...);
}

// The sum of the lanes of each of a vector's width of vectors, in order; they are overwritten.
template <class S, int left = width<S> / 2>
FUSEDATTN_INLINE vec<S> sums_of_lanes(vec<S>* x) {
  constexpr bool lanes = left * 16 < vector_bytes;  // what is left to add
  constexpr auto all = std::make_integer_sequence<int, width<S>>();
#pragma GCC unroll 8
  for (int i = 0; i < left; ++i)
    x[i] = every_second<0, lanes>(x[2 * i], x[2 * i + 1], all) +
           every_second<1, lanes>(x[2 * i], x[2 * i + 1], all);
  if constexpr (left > 1) return sums_of_lanes<S, left / 2>(x);
  return x[0];
}

// Sizes of packed operands, in units per plane.
template <class E>
FUSEDATTN_INLINE int64_t row_units(int64_t k) {
  return round_up(k, 2 * width<stat_of<E>>) / E::per_unit;
}
template <class E>
FUSEDATTN_INLINE int64_t panel_depth(int64_t k) {
  return round_up(k, larger(E::depth_step, 2)) / E::per_unit;
}
template <class E>
FUSEDATTN_INLINE int64_t panel_columns(int64_t n) {
  return round_up(n, E::panel);
}

// Watches rows for infinities, for the engines that cannot take them.
template <class E>
struct InfinityWatch {
  typedef stat_of<E> S;
  ints<S> seen{};

  FUSEDATTN_MEMBER void look(const S* row, int64_t n) {
    if constexpr (E::planes > 1)
      for (int64_t j = 0; j < n; j += width<S>) {
        const vec<S> x = load(row + j);
        seen |= (x == infinity<S>) | (x == -infinity<S>);
      }
  }
  FUSEDATTN_MEMBER bool clear() const { return E::planes == 1 || !any(seen); }
};

// A[i][k] = src[i][k]; rows up to `padded` and columns up to row_units(columns) are zero.
template <class E, class T>
static bool pack_rows(Source<T> src, int64_t rows, int64_t columns, int64_t padded,
                      Rows<unit_of<E>> dst) {
  typedef stat_of<E> S;
  constexpr int w = width<S>;
  alignas(64) S row[chunk];
  InfinityWatch<E> watch;
  for (int64_t c = 0; c < columns; c += chunk) {
    const int64_t n = smaller(columns - c, chunk), wide = round_up(n, 2 * w);
    for (int64_t i = 0; i < padded; ++i) {
      load_row(src.at(i, c), src.column, i < rows ? n : 0, row, wide);
      watch.look(row, wide);
      for (int64_t j = 0; j < wide; j += 2 * w)
        E::put_along(dst, i, c + j, load(row + j), load(row + j + w));
    }
  }
  return watch.clear();
}

// B[k][n] = src[k][n]; rows up to `padded` (even) and columns up to panel_columns(columns) are
// zero.
template <class E, class T>
static bool pack_panels(Source<T> src, int64_t rows, int64_t columns, int64_t padded,
                        Panels<unit_of<E>> dst) {
  typedef stat_of<E> S;
  constexpr int w = width<S>;
  alignas(64) S even[chunk], odd[chunk];
  InfinityWatch<E> watch;
  for (int64_t c = 0; c < columns; c += chunk) {
    const int64_t n = smaller(columns - c, chunk), wide = panel_columns<E>(n);
    for (int64_t k = 0; k < padded; k += 2) {
      load_row(src.at(k, c), src.column, k < rows ? n : 0, even, wide);
      load_row(src.at(k + 1, c), src.column, k + 1 < rows ? n : 0, odd, wide);
      watch.look(even, wide);
      watch.look(odd, wide);
      for (int64_t j = 0; j < wide; j += w)
        E::put_across(dst, k, c + j, load(even + j), load(odd + j));
    }
  }
  return watch.clear();
}

// B[k][n] = src[n][k]: the rows of src become columns. `scratch` holds one vector's width of rows.
template <class E, class T>
static bool pack_panels_transposed(Source<T> src, int64_t rows, int64_t columns, int64_t padded,
                                   Panels<unit_of<E>> dst, unit_of<E>* scratch) {
  typedef unit_of<E> Unit;
  constexpr int w = vector_bytes / int(sizeof(Unit));
  const int64_t units = row_units<E>(columns), depth = panel_depth<E>(columns);
  const Rows<Unit> strip{scratch, units, units * w};
  alignas(64) Unit square[w * w];
  bool good = true;
  for (int64_t n = 0; n < padded; n += w) {
    good &= pack_rows<E>(src.from(n), larger(smaller(rows - n, w), 0), columns, w, strip);
    for (int p = 0; p < E::planes; ++p) {
      Unit* panel = dst.data + p * dst.plane + n / E::panel * dst.depth * E::panel + n % E::panel;
      for (int64_t k = 0; k < depth; k += w) {
        const Unit* from = strip.data + p * strip.plane + k;
        if (k + w <= depth) {
          transpose_square(from, units, panel + k * E::panel, E::panel);
        } else {
          transpose_square(from, units, square, w);
          for (int64_t i = k; i < depth; ++i)
            memcpy(panel + i * E::panel, square + (i - k) * w, vector_bytes);
        }
      }
    }
  }
  return good;
}

// A[i][k] = src[k][i]: the columns of src become rows, whole squares of them, so dst has room for
// columns and depth rounded up to a square. `scratch` holds one square's depth of panels.
template <class E, class T>
static bool pack_rows_transposed(Source<T> src, int64_t rows, int64_t columns, int64_t padded,
                                 Rows<unit_of<E>> dst, unit_of<E>* scratch) {
  typedef unit_of<E> Unit;
  constexpr int w = vector_bytes / int(sizeof(Unit));
  constexpr int strip_rows = w * E::per_unit;
  const int64_t wide = panel_columns<E>(columns);
  const Panels<Unit> strip{scratch, w, wide * w};
  bool good = true;
  for (int64_t k = 0; k < padded; k += strip_rows) {
    good &= pack_panels<E>(src.from(k), larger(smaller(rows - k, strip_rows), 0), columns,
                           strip_rows, strip);
    for (int p = 0; p < E::planes; ++p)
      for (int64_t i = 0; i < columns; i += w) {
        const Unit* from =
            strip.data + p * strip.plane + i / E::panel * w * E::panel + i % E::panel;
        transpose_square(from, E::panel, dst.data + p * dst.plane + i * dst.ld + k / E::per_unit,
                         dst.ld);
      }
  }
  return good;
}

}  // namespace fusedattn::FUSEDATTN_ISA
