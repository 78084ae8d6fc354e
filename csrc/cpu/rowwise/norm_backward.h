// Layer norm and RMS norm, backward. Per row, with n = (z − mean) · rstd and g = dout · weight:
// first Σ g and Σ g·n, and the row's share of dweight = Σ dout · n and dbias = Σ dout; then the
// gradient of z.
#pragma once

#include "norm_rows.h"

namespace fusedattn::FUSEDATTN_ISA {

// Rows whose sum stays in S; in half a million rows summed in fp32 alone the last digits would go.
constexpr int64_t rows_per_flush = 128;

struct RowSums {
  double g, gn;
};

// One sum over a thread's rows for each column: in S over a few rows, then in double if there are
// more. Both are null where it is not wanted.
template <class S>
struct ColumnSum {
  S* recent = nullptr;
  double* total = nullptr;

  FUSEDATTN_MEMBER ColumnSum(const TensorView& wanted, int64_t rows, int64_t width, Arena& arena) {
    if (!wanted) return;
    recent = arena.take<S>(width);
    if (rows > rows_per_flush) total = arena.take<double>(width);
  }

  FUSEDATTN_MEMBER S* from(int64_t column) const { return recent ? recent + column : nullptr; }

  void clear(Range columns) const {
    if (!recent) return;
    memset(recent + columns.begin, 0, (columns.end - columns.begin) * sizeof(S));
    if (total) memset(total + columns.begin, 0, (columns.end - columns.begin) * sizeof(double));
  }
  void flush(Range columns) const {
    if (!total) return;
#pragma omp simd
    for (int64_t i = columns.begin; i < columns.end; ++i) {
      total[i] += double(recent[i]);
      recent[i] = 0;
    }
  }

  // Adds the columns from the first on to as many of `sum`.
  void add_to(double* sum, Range columns) const {
    const int64_t n = columns.end - columns.begin;
    const auto add = [&](const auto* from) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) sum[i] += double(from[i]);
    };
    total ? add(total + columns.begin) : add(recent + columns.begin);
  }
};

template <class S>
struct ColumnSums {
  ColumnSum<S> weight, bias;
  int64_t pending = 0;  // rows in the recent sums

  FUSEDATTN_MEMBER ColumnSums(const NormBackward& p, int64_t rows, int64_t width, Arena& arena)
      // There is no case for dbias alone.
      : weight(p.dweight ? p.dweight : p.dbias, rows, width, arena),
        bias(p.dbias, rows, width, arena) {}

  void clear(Range columns) {
    weight.clear(columns);
    bias.clear(columns);
  }
  void flush(Range columns) {
    weight.flush(columns);
    bias.flush(columns);
    pending = 0;
  }
  // So many rows went into these columns.
  void add(int rows, Range columns) {
    pending += rows;
    if (pending >= rows_per_flush) flush(columns);
  }
};

// Z is the type in which z and dz are read.
template <class T, class Z>
struct NormBackwardRows {
  typedef compute_t<T> S;

  const NormBackward& p;
  const Division& division;
  const Parameter<S>& weight;
  const Dropout dropout;
  const T* const no_dout;           // a row of zeros in place of an absent dout
  Z *const z_rows, *const dz_rows;  // z and dz as S, if they are stored otherwise
  const bool large;                 // past the caches
  const int64_t on;                 // how many rows later a second pass fetches; 0: none

  const T* dout_row(int64_t row, int64_t column) const {
    if (!p.dout) return no_dout + column;
    return static_cast<const T*>(p.dout.data) + row * p.dout.stride[0] + column;
  }
  int64_t buffered(int64_t row) const {
    return (division.split ? row : row % norm_block) * division.width;
  }
  const Z* z_row(int64_t row, int64_t column) const {
    if (z_rows) return z_rows + buffered(row) + column;
    return static_cast<const Z*>(p.z.data) + row * p.z.stride[0] + column;
  }
  const Z* dz_row(int64_t row, int64_t column) const {
    if (dz_rows) return dz_rows + buffered(row) + column;
    return static_cast<const Z*>(p.dz.data) + row * p.dz.stride[0] + column;
  }

  // Reads z and dz into the buffers, where there are some.
  void fetch(int64_t row, Range columns) const {
    if constexpr (sizeof(Z) == sizeof(S)) {
      const int64_t at = buffered(row) + columns.begin, n = columns.end - columns.begin;
      if (z_rows) read_row<S>(p.z, row, columns.begin, n, z_rows + at);
      if (dz_rows) read_row<S>(p.dz, row, columns.begin, n, dz_rows + at);
    }
  }

  // n = (z − mean) · rstd
  struct Normalise {
    S mean, rstd;

    FUSEDATTN_MEMBER Normalise(const NormBackward& p, int64_t row) {
      mean = p.mean ? static_cast<const S*>(p.mean.data)[row] : S(0);
      rstd = static_cast<const S*>(p.rstd.data)[row];
    }
  };

  // Rows row … row + Rows on a chunk, w, dweight and dbias from its first column on; writes each
  // row's sums to sums[r · chunks]; Σ g only where there is a centre.
  template <int Rows, bool Centre, bool Weight, bool Bias>
  void sum_chunk(int64_t row, int64_t column, int64_t n, const S* w, RowSums* sums, S* dweight,
                 S* dbias) const {
    const int64_t chunks = chunks_of(division.width);
    const T* dout[Rows];
    const Z* z[Rows];
    constexpr int ways = 2;  // additions in flight
    constexpr int size = 2 * ways * width<S>;
    vec<S> mean[Rows], rstd[Rows], g_sum[Rows * ways] = {}, gn_sum[Rows * ways] = {};
    vec<S> g_total[Rows] = {}, gn_total[Rows] = {};
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      dout[r] = dout_row(row + r, column);
      z[r] = z_row(row + r, column);
      const Normalise of(p, row + r);
      mean[r] = splat(of.mean);
      rstd[r] = splat(of.rstd);
    }
    const auto add = [&](int64_t i, int way, auto lanes) __attribute__((always_inline)) {
      const vec<S> weights = get<S>(w + i, lanes);
      vec<S> to_weight, to_bias;
      if constexpr (Weight) to_weight = get<S>(dweight + i, lanes);
      if constexpr (Bias) to_bias = get<S>(dbias + i, lanes);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const vec<S> d = rounded(get<S>(dout[r] + i, lanes)), g = d * weights;
        vec<S> x = get<S>(z[r] + i, lanes);
        // Past the end 0: mean · rstd may be infinite.
        if constexpr (Centre) x = zero_past(x - mean[r], lanes);
        x *= rstd[r];
        if constexpr (Weight) to_weight += d * x;
        if constexpr (Bias) to_bias += d;
        if constexpr (Centre) g_sum[r * ways + way] += g;
        gn_sum[r * ways + way] += g * x;
      }
      if constexpr (Weight) set<S>(dweight + i, to_weight, lanes);
      if constexpr (Bias) set<S>(dbias + i, to_bias, lanes);
    };
    // What lies in a page is fetched two rows before.
    const bool ahead = large && !(on && division.width * int64_t(sizeof(T)) < 4096);
    // It is read twice; what is fetched for one reading Intel keeps in the first level alone, where
    // wide rows have no place on any processor.
    const bool stay = last_cache_is_far() || division.width > norm_chunk;
    const auto fetch_page = [stay](const auto* p) {
      stay ? fetch_ahead(p, size, prefetch) : fetch_ahead(p, size);
    };
    const auto block = [&](int64_t i) __attribute__((always_inline)) {
      if (ahead) [[unlikely]] {
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          fetch_page(dout[r] + i);
          fetch_page(z[r] + i);
        }
      }
#pragma GCC unroll 4
      for (int k = 0; k < size; k += width<S>) add(i + k, k / width<S> % ways, Whole{});
    };
    const auto flush = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        g_total[r] += g_sum[r * ways] + g_sum[r * ways + 1];
        gn_total[r] += gn_sum[r * ways] + gn_sum[r * ways + 1];
        g_sum[r * ways] = g_sum[r * ways + 1] = vec<S>{};
        gn_sum[r * ways] = gn_sum[r * ways + 1] = vec<S>{};
      }
    };
    const int64_t i = in_short_sums<size>(n, block, flush);
    for_vectors<S>(n - i, [&](int64_t j, auto lanes) { add(i + j, 0, lanes); });
    flush();
    for (int r = 0; r < Rows; ++r)
      sums[r * chunks] = {double(reduce_add(g_total[r])), double(reduce_add(gn_total[r]))};
  }

  template <int Rows>
  void sum_rows(int64_t row, int64_t column, int64_t n, const S* w, RowSums* sums, S* dweight,
                S* dbias) const {
    if (!p.options.centre && !dbias)
      dweight ? sum_chunk<Rows, false, true, false>(row, column, n, w, sums, dweight, nullptr)
              : sum_chunk<Rows, false, false, false>(row, column, n, w, sums, nullptr, nullptr);
    else if (dweight && dbias)
      sum_chunk<Rows, true, true, true>(row, column, n, w, sums, dweight, dbias);
    else if (dweight)
      sum_chunk<Rows, true, true, false>(row, column, n, w, sums, dweight, nullptr);
    else
      sum_chunk<Rows, true, false, false>(row, column, n, w, sums, nullptr, nullptr);
  }

  template <int Rows>
  void first_pass(int64_t row, Range columns, RowSums* sums, ColumnSums<S>& to) const {
    for (int r = 0; r < Rows; ++r) fetch(row + r, columns);
    for_chunks(columns, [&](int64_t c, int64_t n) {
      sum_rows<Rows>(row, c, n, weight.from(c), sums + c / norm_chunk, to.weight.from(c),
                     to.bias.from(c));
    });
    to.add(Rows, columns);
  }

  // total = (g − Σg / N − n · Σ(g·n) / N) · rstd + dz on a chunk, rounded to the type of `total`;
  // what does not depend on g is slope · (z − mean) + constant, without a centre slope · z.
  template <bool Centre, bool Dz, class To>
  [[gnu::flatten]] void gradient(int64_t row, int64_t column, int64_t n, const S* w,
                                 const RowSums& mean, bool streamed, To* total) const {
    const T* dout = dout_row(row, column);
    const Z* z = z_row(row, column);
    const Z* dz = Dz ? dz_row(row, column) : nullptr;
    const Normalise of(p, row);
    const S slope = S(-double(of.rstd) * mean.gn);
    const S constant = S(-mean.g);
    const auto value = [&](int64_t i, auto lanes) {
      // Rounded as in the first pass: where a row has one element the difference is 0.
      const vec<S> g = rounded(get<S>(dout + i, lanes) * get<S>(w + i, lanes));
      const vec<S> x = get<S>(z + i, lanes);
      vec<S> value = (g + (Centre ? (x - of.mean) * slope + constant : x * slope)) * of.rstd;
      if constexpr (Dz) value += get<S>(dz + i, lanes);
      return value;
    };
    if (!on) return write_vectors<S>(total, n, streamed, value);
    const int64_t dout_on = on * p.dout.stride[0], z_on = z_rows ? 0 : on * p.z.stride[0];
    const int64_t dz_on = dz_rows ? 0 : on * p.dz.stride[0];
    write_vectors<S>(total, n, streamed, value, [&](int64_t i, int count) {
      fetch_lines(dout + dout_on + i, count, prefetch);
      fetch_lines(z + z_on + i, count, prefetch);
      if constexpr (Dz) fetch_lines(dz + dz_on + i, count, prefetch);
    });
  }

  template <class To>
  void gradient_of_z(int64_t row, int64_t column, int64_t n, const S* w, const RowSums& mean,
                     bool streamed, To* to) const {
    if (p.options.centre)
      p.dz ? gradient<true, true>(row, column, n, w, mean, streamed, to)
           : gradient<true, false>(row, column, n, w, mean, streamed, to);
    else
      p.dz ? gradient<false, true>(row, column, n, w, mean, streamed, to)
           : gradient<false, false>(row, column, n, w, mean, streamed, to);
  }

  // Those of g, which a norm without a centre does not need, and of g · n.
  RowSums means(const RowSums* sums) const {
    RowSums total{0, 0};
    for (int64_t c = 0; c < chunks_of(division.width); ++c) {
      total.g += sums[c].g;
      total.gn += sums[c].gn;
    }
    const double width = double(division.width);
    return {p.options.centre ? total.g / width : 0, total.gn / width};
  }

  // dx on a chunk, w from its first column on.
  void gradient_of_chunk(int64_t row, int64_t column, int64_t n, const S* w,
                         const RowSums& mean) const {
    T* const dx = static_cast<T*>(p.dx.data) + row * p.dx.stride[0] + column;
    if (!dropout && !p.dresidual) return gradient_of_z(row, column, n, w, mean, large, dx);
    alignas(64) S chunk[norm_chunk];
    gradient_of_z(row, column, n, w, mean, false, chunk);
    if (p.dresidual) write_row(p.dresidual, row, column, n, chunk);
    through_dropout(row, column, n, chunk, dx);
  }

  void second_pass(int64_t row, Range columns, const RowSums* sums) const {
    const RowSums mean = means(sums);
    for_chunks(columns,
               [&](int64_t c, int64_t n) { gradient_of_chunk(row, c, n, weight.from(c), mean); });
  }

  void through_dropout(int64_t row, int64_t column, int64_t n, const S* total, T* dx) const {
    alignas(64) uint8_t keep[norm_chunk];
    if (dropout) keep_mask(dropout, row, column, n, keep);
    write_vectors<S>(dx, n, large, [&](int64_t i, auto lanes) {
      vec<S> value = get<S>(total + i, lanes);
      if (dropout) value = select_bytes<S>(keep + i, value * S(dropout.factor), vec<S>{});
      return value;
    });
  }
};

// One thread's rows. Short ones go through the first pass together, which then reads and writes the
// sums over rows once for all of them; long ones do not, so that memory is read in its order.
template <class T, class Z>
static void norm_backward_rows(const NormBackwardRows<T, Z>& f, const Share& share, RowSums* sums,
                               ColumnSums<compute_t<T>>& to) {
  const int64_t chunks = chunks_of(f.division.width);
  const bool alone = is_long<T>(f.division);
  // Blocks start at multiples of their size, so that a row's place in the buffers is its own.
  for (int64_t row = share.rows.begin; row < share.rows.end;) {
    const bool block = !alone && row % norm_block == 0 && row + norm_block <= share.rows.end;
    const int rows = block ? norm_block : 1;
    if (block)
      f.template first_pass<norm_block>(row, share.columns, sums, to);
    else
      f.template first_pass<1>(row, share.columns, sums, to);
    for (int r = 0; r < rows; ++r) f.second_pass(row + r, share.columns, sums + r * chunks);
    row += rows;
  }
}

// The threads' sums, added in the threads' order, from column `first` on in the gradient.
template <class S, class Copy>
static void write_column_sums(const TensorView& to, int64_t first, Range columns, int64_t copies,
                              const Copy& copy) {
  if (!to) return;
  for_chunks(columns, [&](int64_t c, int64_t n) {
    const ColumnSum<S> one = copy(0);
    if (copies == 1 && !one.total) return write_row(to, 0, first + c, n, one.recent + c);
    alignas(64) double sum[norm_chunk];
    alignas(64) S rounded[norm_chunk];
    memset(sum, 0, n * sizeof(double));
    for (int64_t t = 0; t < copies; ++t) copy(t).add_to(sum, {c, c + n});
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) rounded[i] = S(sum[i]);
    write_row(to, 0, first + c, n, rounded);
  });
}

// One thread's columns of all rows, chunk by chunk; the threads wait for each other's sums.
template <class T, class Z>
static void norm_backward_columns(const NormBackwardRows<T, Z>& f, const Share& share,
                                  RowSums* sums) {
  typedef compute_t<T> S;
  const int64_t rows = f.division.rows, chunks = chunks_of(f.division.width);
  alignas(64) S weight[norm_chunk];
  alignas(64) char memory[2 * norm_chunk * (sizeof(S) + sizeof(double))];
  Arena arena(memory);
  ColumnSums<S> to(f.p, rows, norm_chunk, arena);
  for (int64_t row = 0; row < rows; ++row) f.fetch(row, share.columns);
  for_chunks(share.columns, [&](int64_t c, int64_t n) {
    const Range here{0, n};
    const S* const w = f.weight.chunk({c, c + n}, weight);
    RowSums* const of_chunk = sums + c / norm_chunk;
    S *const dweight = to.weight.recent, *const dbias = to.bias.recent;
    to.clear(here);
    int64_t row = 0;
    for (; row + norm_block <= rows; row += norm_block) {
      f.template sum_rows<norm_block>(row, c, n, w, of_chunk + row * chunks, dweight, dbias);
      to.add(norm_block, here);
    }
    for (; row < rows; ++row) {
      f.template sum_rows<1>(row, c, n, w, of_chunk + row * chunks, dweight, dbias);
      to.add(1, here);
    }
    to.flush(here);
    write_column_sums<S>(f.p.dweight, c, here, 1, [&](int64_t) { return to.weight; });
    write_column_sums<S>(f.p.dbias, c, here, 1, [&](int64_t) { return to.bias; });
  });
#pragma omp barrier
  for (int64_t first = 0; first < rows; first += rows_at_once) {
    const int64_t count = rows - first < rows_at_once ? rows - first : rows_at_once;
    RowSums means[rows_at_once];
    for (int64_t r = 0; r < count; ++r) means[r] = f.means(sums + (first + r) * chunks);
    for_chunks(share.columns, [&](int64_t c, int64_t n) {
      const S* const w = f.weight.chunk({c, c + n}, weight);
      for (int64_t r = 0; r < count; ++r) f.gradient_of_chunk(first + r, c, n, w, means[r]);
    });
  }
}

template <class T, class Z>
static bool norm_backward_short(const NormBackwardRows<T, Z>& f, Range rows,
                                ColumnSums<compute_t<T>>& to);  // norm_short.h

template <class T>
struct NormBackwardShared {
  Parameter<compute_t<T>> weight;
  T* no_dout;

  FUSEDATTN_MEMBER NormBackwardShared(const NormBackward& p, const Division& d, Arena& arena)
      : weight(p.weight, p.options.weight_offset, true, d, arena),
        no_dout(p.dout ? nullptr : arena.take<T>(d.width)) {}
};

// Of one thread, or of all if split.
template <class T, class Z>
struct NormBackwardOwn {
  RowSums* sums;
  ColumnSums<compute_t<T>> columns;
  Z *z = nullptr, *dz = nullptr;

  FUSEDATTN_MEMBER NormBackwardOwn(const NormBackward& p, const Division& d, Arena& arena)
      // Where threads divide the columns, each has its sums for a chunk at a time.
      : sums(arena.take<RowSums>(rows(d) * chunks_of(d.width))),
        columns(p, d.rows_each(), d.split ? 0 : d.width, arena) {
    if (p.z.dtype != dtype_of<Z>) z = arena.take<Z>(rows(d) * d.width);
    if (p.dz && p.dz.dtype != dtype_of<Z>) dz = arena.take<Z>(rows(d) * d.width);
  }
  FUSEDATTN_MEMBER static int64_t rows(const Division& d) { return d.split ? d.rows : norm_block; }
};

template <class T, class Z>
static bool norm_backward_of(const NormBackward& p) {
  typedef compute_t<T> S;
  typedef NormBackwardShared<T> Shared;
  typedef NormBackwardOwn<T, Z> Own;
  const auto outgrow = [&](int quarters) {
    return outgrows_caches(quarters, threads_for_elements(p.work()), p.work(), p.dout, p.dz, p.z,
                           p.dx, p.dresidual);
  };
  const bool large = outgrow(1);
  const Division division(p.rows(), p.width(), !outgrow(4));
  const int64_t width = division.width, copies = division.copies();
  const Workspace workspace(bytes_of_scratch<Shared>(p, division),
                            bytes_of_scratch<Own>(p, division), copies);
  Arena common = workspace.shared();
  const Shared shared(p, division, common);
  const Dropout dropout = p.seed ? Dropout(p.seed, p.options.dropout_p) : Dropout();
  shared.weight.convert_all(width);
  if (shared.no_dout) memset(static_cast<void*>(shared.no_dout), 0, width * sizeof(T));
  const auto own_of = [&](int64_t thread) {
    Arena arena = workspace.own(thread);
    return Own(p, division, arena);
  };
  const int64_t on = rows_on(large && !division.split, division.rows, width * int64_t(sizeof(T)));
  on_threads(division.threads, [&] {
    const int thread = omp_get_thread_num();
    const Share share = division.share(thread);
    Own own = own_of(division.split ? 0 : thread);
    const NormBackwardRows<T, Z> rows{p,     division, shared.weight, dropout, shared.no_dout,
                                      own.z, own.dz,   large,         on};
    if (division.split) {
      norm_backward_columns(rows, share, own.sums);
      if (large) drain();
      return;
    }
    own.columns.clear(share.columns);
    if (!norm_backward_short(rows, share.rows, own.columns))
      norm_backward_rows(rows, share, own.sums, own.columns);
    if (large) drain();
    own.columns.flush(share.columns);
#pragma omp barrier
    const Range columns = part_of(width, thread, division.threads, norm_chunk);
    write_column_sums<S>(p.dweight, 0, columns, copies,
                         [&](int64_t t) { return own_of(t).columns.weight; });
    write_column_sums<S>(p.dbias, 0, columns, copies,
                         [&](int64_t t) { return own_of(t).columns.bias; });
  });
  return true;
}

template <class T>
static bool norm_backward(const NormBackward& p) {
  if (p.z.dtype == dtype_of<T>) return norm_backward_of<T, T>(p);
  return norm_backward_of<T, compute_t<T>>(p);
}

}  // namespace fusedattn::FUSEDATTN_ISA
