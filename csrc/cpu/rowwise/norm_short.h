// Norms over rows of four or eight vectors, such as the heads of q and k: a row stays in registers
// from the first pass to the second, and the sums over rows from row to row.
#pragma once

#include "norm_backward.h"
#include "norm_forward.h"

namespace fusedattn::FUSEDATTN_ISA {

// f(the row's vectors as a constant); false if there is no case for rows of n elements.
template <class T, class F>
FUSEDATTN_INLINE bool with_few_vectors(int64_t n, const F& f) {
  if (sizeof(compute_t<T>) == sizeof(double)) return false;
  if (FewVectors<T, 4>::fit(n)) return f(std::integral_constant<int, 4>{}), true;
  if (FewVectors<T, 8>::fit(n)) return f(std::integral_constant<int, 8>{}), true;
  return false;
}

template <int Vectors, class T>
static void rms_forward_few(const NormForwardRows<T, T>& f, Range rows) {
  typedef compute_t<T> S;
  const int64_t n = f.division.width;
  const FewVectors<T, Vectors> row_of(n);
  vec<S> weight[Vectors];
  FewVectors<S, Vectors>(n).load(f.weight.from(0), 0, weight);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if (f.on) fetch_lines(f.x_row(row + f.on, 0), int(n), prefetch);
    vec<S> x[Vectors], squares[Vectors];
    row_of.load(f.x_row(row, 0), 0, x);
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) squares[v] = x[v] * x[v];
    const Moments moments{0, row_of.sum(squares)};
    const RowStatistics s = f.statistics(row, &moments);
    f.keep(row, s);
    const S rstd = S(s.rstd);
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) x[v] = x[v] * rstd * weight[v];
    row_of.store(static_cast<T*>(f.p.out.data) + row * f.p.out.stride[0], x, f.goes_past(row));
  }
}

// Whether these were all rows of x, taken in few vectors. Layer norm's two sums of a row one after
// the other gain nothing.
template <class T, class P>
static bool norm_forward_short(const NormForwardRows<T, P>& f, Range rows) {
  if constexpr (std::is_same_v<T, P>) {
    if (f.p.z || f.p.options.centre || !f.weight.from(0) || f.bias.from(0)) return false;
    return with_few_vectors<T>(f.division.width,
                               [&](auto vectors) { rms_forward_few<vectors()>(f, rows); });
  }
  return false;
}

template <int Vectors, bool Centre, bool Bias, class T>
static void norm_backward_few(const NormBackwardRows<T, T>& f, Range rows,
                              ColumnSums<compute_t<T>>& to) {
  typedef compute_t<T> S;
  const int64_t n = f.division.width;
  const FewVectors<T, Vectors> row_of(n);
  const FewVectors<S, Vectors> parameter(n);
  vec<S> weight[Vectors];
  parameter.load(f.weight.from(0), 0, weight);
  for (int64_t row = rows.begin; row < rows.end;) {
    const int64_t first = row;
    const int64_t end = rows.end - row < rows_per_flush ? rows.end : row + rows_per_flush;
    vec<S> dweight[Vectors] = {}, dbias[Vectors] = {};
    for (; row < end; ++row) {
      if (f.on) {
        fetch_lines(f.dout_row(row + f.on, 0), int(n), prefetch);
        fetch_lines(f.z_row(row + f.on, 0), int(n), prefetch);
      }
      const typename NormBackwardRows<T, T>::Normalise of(f.p, row);
      vec<S> d[Vectors], x[Vectors], product[Vectors];
      row_of.load(f.dout_row(row, 0), 0, d);
      row_of.load(f.z_row(row, 0), of.mean, x);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        x[v] = (x[v] - of.mean) * of.rstd;
        dweight[v] += d[v] * x[v];
        if constexpr (Bias) dbias[v] += d[v];
        d[v] = rounded(d[v] * weight[v]);
        product[v] = d[v] * x[v];
      }
      const RowSums sums{Centre ? row_of.sum(d) : S(0), row_of.sum(product)};
      const RowSums mean = f.means(&sums);
      const S mean_g = S(mean.g), mean_gn = S(mean.gn);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        if constexpr (Centre) d[v] -= mean_g;
        d[v] = (d[v] - x[v] * mean_gn) * of.rstd;
      }
      row_of.store(static_cast<T*>(f.p.dx.data) + row * f.p.dx.stride[0], d, f.large);
    }
    parameter.store(to.weight.from(0), dweight);
    if constexpr (Bias) parameter.store(to.bias.from(0), dbias);
    to.add(int(end - first), {0, n});
  }
}

// Whether these were all rows of dout and x, read in place and taken in few vectors.
template <class T, class Z>
static bool norm_backward_short(const NormBackwardRows<T, Z>& f, Range rows,
                                ColumnSums<compute_t<T>>& to) {
  const bool bias = bool(f.p.dbias), centre = f.p.options.centre;
  if constexpr (std::is_same_v<T, Z>) {
    if (!f.p.dout || f.p.dz || f.p.dresidual || f.dropout || f.z_rows) return false;
    if (!f.p.dweight || (bias && !centre)) return false;
    return with_few_vectors<T>(f.division.width, [&](auto vectors) {
      if (bias) return norm_backward_few<vectors(), true, true>(f, rows, to);
      if (centre) return norm_backward_few<vectors(), true, false>(f, rows, to);
      norm_backward_few<vectors(), false, false>(f, rows, to);
    });
  }
  return false;
}

}  // namespace fusedattn::FUSEDATTN_ISA
