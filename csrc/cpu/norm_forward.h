// Layer norm and RMS norm, forward. Per row: z = dropout(x) + residual, stored in its own dtype and
// read back as it was rounded; mean; variance about it; out. The row stays in cache between them.
#pragma once

#include "norm_rows.h"

namespace fusedattn::FUSEDATTN_ISA {

// Σ scale · x over a chunk.
template <class S, class P>
static double chunk_sum(const P* x, int64_t n, S scale) {
  constexpr int w = width<S>, ways = 4;  // additions in flight
  vec<S> sums[ways] = {};
  int64_t i = 0;
  for (; i + ways * w <= n; i += ways * w)
    for (int k = 0; k < ways; ++k) sums[k] += get<S>(x + i + k * w, Whole{}) * scale;
  for_vectors<S>(n - i,
                 [&](int64_t j, auto lanes) { sums[0] += get<S>(x + i + j, lanes) * scale; });
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

struct Deviations {
  double first, second;
};

// Σ d and Σ d² with d = scale · x − centre, over a chunk.
template <class S, class P>
static Deviations chunk_deviations(const P* x, int64_t n, S scale, S centre) {
  constexpr int w = width<S>, ways = 4;
  vec<S> first[ways] = {}, second[ways] = {};
  int64_t i = 0;
  for (; i + ways * w <= n; i += ways * w)
    for (int k = 0; k < ways; ++k) {
      const vec<S> d = get<S>(x + i + k * w, Whole{}) * scale - centre;
      first[k] += d;
      second[k] += d * d;
    }
  for_vectors<S>(n - i, [&](int64_t j, auto lanes) {
    const vec<S> d = zero_past(get<S>(x + i + j, lanes) * scale - centre, lanes);
    first[0] += d;
    second[0] += d * d;
  });
  return {reduce_add((first[0] + first[1]) + (first[2] + first[3])),
          reduce_add((second[0] + second[1]) + (second[2] + second[3]))};
}

// A row's statistics in units of `scale`: d = scale · x − centre has the mean `rest`, and
// n = (d − rest) · rstd. `centre` is the mean as the first pass rounds it, so that d is exact.
template <class S>
struct RowStatistics {
  double scale = 1, centre = 0, rest = 0, variance = 0;

  bool moves = false;  // layer norm: `rest` is subtracted

  FUSEDATTN_MEMBER double rstd(double eps) const {
    return 1 / __builtin_sqrt(variance + eps * scale * scale);
  }
  // Whether the squares left the range of S; NaN counts.
  FUSEDATTN_MEMBER double better_scale(double eps) const {
    if (!(variance <= double(infinity<S>) / 2)) return shrink<S>;
    return variance < vanishing<S> && eps < vanishing<S> ? 1 / shrink<S> : 1;
  }
  FUSEDATTN_MEMBER void finish(const Deviations& total, double width) {
    rest = moves ? total.first / width : 0;
    variance = total.second / width - rest * rest;
    if (variance < 0) variance = 0;
  }
};

template <class T>
struct NormForwardRows {
  typedef compute_t<T> S;

  const NormForward& p;
  const Division& division;
  const Parameter<S>& weight;
  const Parameter<S>& bias;
  const Dropout dropout;
  S* const rows_as_s;  // z as S where it is stored otherwise: one row, or all of them if split

  // z of a row as it is read back, from `column`.
  S* z_row(int64_t row, int64_t column) const {
    if (p.z.dtype == dtype_of<S>) return static_cast<S*>(p.z.data) + row * p.z.stride[0] + column;
    return rows_as_s + (division.split ? row * division.width : 0) + column;
  }

  // z = dropout(x) + residual on a chunk.
  void combine(int64_t row, int64_t column, int64_t n) const {
    const T* x = static_cast<const T*>(p.x.data) + row * p.x.stride[0] + column;
    S* z = z_row(row, column);
    alignas(64) uint8_t keep[norm_chunk];
    if (dropout) keep_mask(dropout, row, column, n, keep);
    if (p.residual) read_row(p.residual, row, column, n, z);
    for_vectors<S>(n, [&](int64_t i, auto lanes) {
      vec<S> value = get<S>(x + i, lanes);
      if (dropout) value = select_bytes<S>(keep + i, value * S(dropout.factor), vec<S>{});
      if (p.residual) value += get<S>(z + i, lanes);
      set<S>(z + i, value, lanes);
    });
    if (p.z.dtype == dtype_of<S>) return;
    write_row(p.z, row, column, n, z);
    read_row(p.z, row, column, n, z);
  }

  // f(what is normalised, from `column`): x itself, or z.
  template <class F>
  FUSEDATTN_MEMBER void with_source(int64_t row, int64_t column, const F& f) const {
    if (p.z)
      f(static_cast<const S*>(z_row(row, column)));
    else
      f(static_cast<const T*>(p.x.data) + row * p.x.stride[0] + column);
  }

  void first_pass(int64_t row, Range columns, double* partial) const {
    for_chunks(columns, [&](int64_t c, int64_t n) {
      if (p.z) combine(row, c, n);
      if (!p.options.centre) return;
      with_source(row, c,
                  [&](const auto* x) { partial[c / norm_chunk] = chunk_sum<S>(x, n, S(1)); });
    });
  }

  void second_pass(int64_t row, Range columns, const RowStatistics<S>& s,
                   Deviations* partial) const {
    for_chunks(columns, [&](int64_t c, int64_t n) {
      with_source(row, c, [&](const auto* x) {
        partial[c / norm_chunk] = chunk_deviations<S>(x, n, S(s.scale), S(s.centre));
      });
    });
  }

  RowStatistics<S> begin(const double* partial, double scale = 1) const {
    RowStatistics<S> s;
    s.scale = scale;
    s.moves = p.options.centre;
    if (p.options.centre) {
      double total = 0;
      for (int64_t c = 0; c < chunks_of(division.width); ++c) total += partial[c];
      s.centre = S(total / double(division.width));
    }
    return s;
  }

  void end(RowStatistics<S>& s, const Deviations* partial) const {
    Deviations total{0, 0};
    for (int64_t c = 0; c < chunks_of(division.width); ++c) {
      total.first += partial[c].first;
      total.second += partial[c].second;
    }
    s.finish(total, double(division.width));
  }

  // The statistics once more, in units in which the squares are in range. Rare: whoever shares the
  // row does it alone.
  RowStatistics<S> rescaled(int64_t row, double scale) const {
    double total = 0;
    Deviations moments{0, 0};
    const Range all{0, division.width};
    if (p.options.centre)
      for_chunks(all, [&](int64_t c, int64_t n) {
        with_source(row, c, [&](const auto* x) { total += chunk_sum<S>(x, n, S(scale)); });
      });
    RowStatistics<S> s;
    s.scale = scale;
    s.moves = p.options.centre;
    s.centre = S(total / double(division.width));
    for_chunks(all, [&](int64_t c, int64_t n) {
      with_source(row, c, [&](const auto* x) {
        const Deviations here = chunk_deviations<S>(x, n, S(scale), S(s.centre));
        moments.first += here.first;
        moments.second += here.second;
      });
    });
    s.finish(moments, double(division.width));
    return s;
  }

  // out = ((scale · z − centre) · rstd − rest · rstd) · weight + bias
  template <bool Weight, bool Bias, class P>
  FUSEDATTN_INLINE void scale_and_shift(const P* z, T* out, int64_t n, S scale, S centre, S rstd,
                                        S rest, const S* weight, const S* bias) {
    for_vectors<S>(n, [&](int64_t i, auto lanes) {
      vec<S> value = (get<S>(z + i, lanes) * scale - centre) * rstd + rest;
      if constexpr (Weight) value *= get<S>(weight + i, lanes);
      if constexpr (Bias) value += get<S>(bias + i, lanes);
      set<S>(out + i, value, lanes);
    });
  }

  void write(int64_t row, Range columns, RowStatistics<S> s) const {
    const double eps = p.options.eps, better = s.better_scale(eps);
    if (better != 1) s = rescaled(row, better);
    const double rstd = s.rstd(eps);
    if (columns.begin == 0) {
      static_cast<S*>(p.rstd.data)[row] = S(rstd * s.scale);
      if (p.mean) static_cast<S*>(p.mean.data)[row] = S((s.centre + s.rest) / s.scale);
    }
    T* out = static_cast<T*>(p.out.data) + row * p.out.stride[0] + columns.begin;
    const int64_t n = columns.end - columns.begin;
    const S* w = weight.data() ? weight.data() + columns.begin : nullptr;
    const S* b = bias.data() ? bias.data() + columns.begin : nullptr;
    const S scale = S(s.scale), centre = S(s.centre), factor = S(rstd), rest = S(-s.rest * rstd);
    with_source(row, columns.begin, [&](const auto* z) {
      if (w && b)
        scale_and_shift<true, true>(z, out, n, scale, centre, factor, rest, w, b);
      else if (w)
        scale_and_shift<true, false>(z, out, n, scale, centre, factor, rest, w, b);
      else if (b)
        scale_and_shift<false, true>(z, out, n, scale, centre, factor, rest, w, b);
      else
        scale_and_shift<false, false>(z, out, n, scale, centre, factor, rest, w, b);
    });
  }
};

// One thread's rows, from first to last.
template <class T>
static void norm_forward_rows(const NormForwardRows<T>& f, const Share& share, double* sums,
                              Deviations* moments) {
  for (int64_t row = share.rows.begin; row < share.rows.end; ++row) {
    f.first_pass(row, share.columns, sums);
    auto statistics = f.begin(sums);
    f.second_pass(row, share.columns, statistics, moments);
    f.end(statistics, moments);
    f.write(row, share.columns, statistics);
  }
}

// One thread's columns of all rows; the threads wait for each other's sums.
template <class T>
static void norm_forward_columns(const NormForwardRows<T>& f, const Share& share, double* sums,
                                 Deviations* moments) {
  const int64_t rows = f.division.rows, chunks = chunks_of(f.division.width);
  f.weight.convert(share.columns);
  f.bias.convert(share.columns);
  for (int64_t row = 0; row < rows; ++row) f.first_pass(row, share.columns, sums + row * chunks);
#pragma omp barrier
  for (int64_t row = 0; row < rows; ++row)
    f.second_pass(row, share.columns, f.begin(sums + row * chunks), moments + row * chunks);
#pragma omp barrier
  for (int64_t row = 0; row < rows; ++row) {
    auto statistics = f.begin(sums + row * chunks);
    f.end(statistics, moments + row * chunks);
    f.write(row, share.columns, statistics);
  }
}

// The scratch of a call; without memory behind the arena it only counts.
template <class T>
struct NormForwardScratch {
  typedef compute_t<T> S;

  Parameter<S> weight, bias;
  int64_t rows, width, chunks;  // of the buffers: a row for each thread, or all rows if split
  double* sums;
  Deviations* moments;
  S* z;
  size_t bytes;

  FUSEDATTN_MEMBER NormForwardScratch(const NormForward& p, const Division& d, Arena arena)
      : weight(p.weight, p.options.weight_offset, false, d.width, arena),
        bias(p.bias, 0, false, d.width, arena),
        rows(d.split ? d.rows : d.threads),
        width(p.z && p.z.dtype != dtype_of<S> ? d.width : 0),
        chunks(chunks_of(d.width)),
        sums(arena.take<double>(rows * chunks)),
        moments(arena.take<Deviations>(rows * chunks)),
        z(arena.take<S>(rows * width)),
        bytes(arena.used()) {}
};

template <class T>
static bool norm_forward(const NormForward& p) {
  const Division division(p.rows(), p.width());
  const Workspace memory(NormForwardScratch<T>(p, division, Arena()).bytes);
  const NormForwardScratch<T> scratch(p, division, Arena(memory.data()));
  const Dropout dropout = p.seed ? Dropout(p.seed, p.options.dropout_p) : Dropout();
  if (!division.split) {
    scratch.weight.convert({0, division.width});
    scratch.bias.convert({0, division.width});
  }
#pragma omp parallel num_threads(division.threads) if (division.threads > 1)
  {
    const int64_t own = division.split ? 0 : omp_get_thread_num();
    const Share share = division.share(omp_get_thread_num());
    const NormForwardRows<T> rows{
        p, division, scratch.weight, scratch.bias, dropout, scratch.z + own * scratch.width};
    double* const sums = scratch.sums + own * scratch.chunks;
    Deviations* const moments = scratch.moments + own * scratch.chunks;
    if (division.split)
      norm_forward_columns(rows, share, sums, moments);
    else
      norm_forward_rows(rows, share, sums, moments);
  }
  return true;
}

}  // namespace fusedattn::FUSEDATTN_ISA
