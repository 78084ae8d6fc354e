// Layer norm and RMS norm, forward. Per row: z = dropout(x) + residual, rounded to its own dtype;
// its statistics, chunk by chunk; out = (z − mean) · rstd · weight + bias.
#pragma once

#include "norm_moments.h"

namespace fusedattn::FUSEDATTN_ISA {

struct RowStatistics {
  double mean, rstd;
};

// Which rows of out go past the caches.
enum class RowsPast { none, half, all };

// P is the type of what is normalised: x itself, or z.
template <class T, class P>
struct NormForwardRows {
  typedef compute_t<T> S;

  const NormForward& p;
  const Division& division;
  const Parameter<S>& weight;
  const Parameter<S>& bias;
  const Dropout dropout;
  P* const buffer;   // z where it is stored otherwise or past the caches: two rows, or all if split
  const bool large;  // past the caches: z
  const RowsPast out_past;
  const int64_t on;  // how many rows later a second pass fetches; 0: none

  const T* x_row(int64_t row, int64_t column) const {
    return static_cast<const T*>(p.x.data) + row * p.x.stride[0] + column;
  }
  P* z_row(int64_t row, int64_t column) const {
    if (buffer) return buffer + (division.split ? row : row % norm_block) * division.width + column;
    return static_cast<P*>(p.z.data) + row * p.z.stride[0] + column;
  }
  const P* source(int64_t row, int64_t column) const {
    if constexpr (std::is_same_v<T, P>)
      if (!p.z) return x_row(row, column);
    return z_row(row, column);
  }

  // z = dropout(x) + residual on a chunk.
  void combine(int64_t row, int64_t column, int64_t n) const {
    const T* x = x_row(row, column);
    P* z = z_row(row, column);
    alignas(64) uint8_t keep[norm_chunk];
    if (dropout) keep_mask(dropout, row, column, n, keep);
    P* const past = buffer && p.z.dtype == dtype_of<P>
                        ? static_cast<P*>(p.z.data) + row * p.z.stride[0] + column
                        : nullptr;
    const auto write = [&](const auto* residual) {
      const int64_t strip = large ? 512 / sizeof(T) : n;  // reads and writes take turns
      for (int64_t first = 0; first < n; first += strip) {
        if (large) {
          fetch_ahead(x + first, strip);
          if (residual) fetch_ahead(residual + first, strip);
        }
        const int64_t left = n - first < strip ? n - first : strip;
        write_vectors<S>(z + first, left, false, [&](int64_t j, auto lanes) {
          const int64_t i = first + j;
          vec<S> value = get<S>(x + i, lanes);
          if (dropout) value = select_bytes<S>(keep + i, value * S(dropout.factor), vec<S>{});
          if (residual) value += get<S>(residual + i, lanes);
          return value;
        });
        if (past) stream_copy(past + first, z + first, left);
      }
    };
    if (p.residual)
      typed(p.residual, row, column, write);
    else
      write(static_cast<const S*>(nullptr));
    if constexpr (std::is_same_v<S, P>) {
      if (!buffer || past) return;
      write_row<S>(p.z, row, column, n, z);
      read_row<S>(p.z, row, column, n, z);
    }
  }

  // The elements of out: (z − mean) · rstd · weight + bias; the difference first, so that a row of
  // equal elements gives the bias itself. RMS norm has a mean of 0.
  template <bool Weight, bool Bias, bool Centre = true>
  static auto scaled(const P* z, S mean, S rstd, const S* weight, const S* bias) {
    return [=](int64_t i, auto lanes) __attribute__((always_inline)) {
      vec<S> value = get<S>(z + i, lanes);
      if constexpr (Centre) value -= mean;
      value *= rstd;
      if constexpr (Weight) value *= get<S>(weight + i, lanes);
      if constexpr (Bias) value += get<S>(bias + i, lanes);
      return value;
    };
  }

  // Whether `combine_next` serves: x + residual past the caches, in the dtypes that follow from
  // theirs, and rows of which several stay close.
  bool combines_next() const {
    return large && p.residual && !dropout && division.width <= norm_chunk &&
           p.z.dtype == dtype_of<P> && p.residual.dtype == dtype_of<P>;
  }

  // Half of them in blocks: every second row alone is slower.
  bool goes_past(int64_t row) const {
    return out_past == RowsPast::all || (out_past == RowsPast::half && row / 32 % 2 == 0);
  }

  // z = x + residual and its moments for the next row, out for this one, in one loop, so that
  // memory is read and written all the time. To the same bits as one after the other.
  template <bool Bias>
  FUSEDATTN_MEMBER Moments combine_next(int64_t row, S mean, S rstd) const {
    constexpr bool in_place = std::is_same_v<S, P>;  // else the moments are those of rounded z
    constexpr int w = width<S>, ways = SumsInVectors<true, S>::ways;
    const int64_t n = division.width, next = row + 1;
    const T* const x = x_row(next, 0);
    const P* const residual = static_cast<const P*>(p.residual.data) + next * p.residual.stride[0];
    P* const past = static_cast<P*>(p.z.data) + next * p.z.stride[0];
    P* const z = z_row(next, 0);
    T* const out = static_cast<T*>(p.out.data) + row * p.out.stride[0];
    const auto sum = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      return get<S>(x + i, lanes) + get<S>(residual + i, lanes);
    };
    const auto result = scaled<true, Bias>(z_row(row, 0), mean, rstd, weight.from(0), bias.from(0));
    const bool stream_z = can_stream(past), stream_out = goes_past(row) && can_stream(out);
    const S centre = in_place && p.options.centre ? mean_of_first<S>(n, sum) : S(0);
    SumsInVectors<true, S> sums;
    const auto block = [&](int64_t i) __attribute__((always_inline)) {
      fetch_ahead(x + i, ways * w, prefetch);
      fetch_ahead(residual + i, ways * w, prefetch);
      if (!stream_out) fetch_ahead(out + i, ways * w, prefetch_to_write);
#pragma GCC unroll 2
      for (int k = 0; k < ways; k += 2) {
        const int64_t j = i + k * w;
        const vec<S> first = sum(j, Whole{}), second = sum(j + w, Whole{});
        set_pair<S>(z + j, first, second);
        stream_z ? stream_pair<S>(past + j, first, second) : set_pair<S>(past + j, first, second);
        if constexpr (in_place) {
          sums.add(k, first - centre);
          sums.add(k + 1, second - centre);
        }
        const vec<S> a = result(j, Whole{}), b = result(j + w, Whole{});
        stream_out ? stream_pair<S>(out + j, a, b) : set_pair<S>(out + j, a, b);
      }
    };
    const int64_t i = in_short_sums<ways * w>(n, block, [&] { sums.flush(); });
    for_vectors<S>(n - i, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
      const vec<S> value = sum(i + j, lanes);
      set<S>(z + i + j, value, lanes);
      set<S>(past + i + j, value, lanes);
      if constexpr (in_place) sums.add(0, zero_past(value - centre, lanes));
      set<S>(out + i + j, result(i + j, lanes), lanes);
    });
    if constexpr (in_place) {
      const Deviations d{sums.total(), centre, n};
      if (!p.options.centre) return {0, d.sums.second};
      if (d.precise()) return d.moments();
    }
    return moments(next, 0, n);
  }

  // Whether `scale_and_sum` serves: what is normalised is x, in one chunk.
  bool sums_next() const { return !p.z && division.width <= norm_chunk; }

  // out for this row and the moments of one to come in one loop, so that neither memory nor
  // arithmetic waits for the other. To the same bits as one after the other.
  template <bool Weight, bool Bias, bool Centre>
  FUSEDATTN_MEMBER Moments scale_and_sum(int64_t row, int64_t next, S mean, S rstd) const {
    typedef MomentsInBlocks<Centre, S, P> Next;
    constexpr int w = width<S>;
    const int64_t n = division.width;
    T* const out = static_cast<T*>(p.out.data) + row * p.out.stride[0];
    const auto result =
        scaled<Weight, Bias, Centre>(source(row, 0), mean, rstd, weight.from(0), bias.from(0));
    const bool fetches = on, streamed = goes_past(row) && can_stream(out);
    const T* const far = x_row(next + on, 0);
    Next moments(source(next, 0), n);
    const auto block = [&](int64_t i) __attribute__((always_inline)) {
      if (fetches) fetch_lines(far + i, Next::block, prefetch);
      moments.add(i);
#pragma GCC unroll 4
      for (int64_t j = i; j < i + Next::block; j += 2 * w) {
        const vec<S> a = result(j, Whole{}), b = result(j + w, Whole{});
        streamed ? stream_pair<S>(out + j, a, b) : set_pair<S>(out + j, a, b);
      }
    };
    const int64_t i = in_short_sums<Next::block>(n, block, [&] { moments.flush(); });
    for_vectors<S>(n - i, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
      set<S>(out + i + j, result(i + j, lanes), lanes);
    });
    return moments.finish(i);
  }

  Moments moments(int64_t row, int64_t column, int64_t n) const {
    const P* const z = source(row, column);
    const bool ahead = large && !p.z && !on;
    return p.options.centre ? moments_of<true, S>(z, n, ahead) : moments_of<false, S>(z, n, ahead);
  }

  void first_pass(int64_t row, Range columns, Moments* chunks) const {
    for_chunks(columns, [&](int64_t c, int64_t n) {
      if (p.z) combine(row, c, n);
      chunks[c / norm_chunk] = moments(row, c, n);
    });
  }

  // The chunks' moments as the row's (Chan et al. 1979), in units of `scale`.
  Moments merge(const Moments* chunks) const {
    const int64_t width = division.width;
    Moments row{0, 0};
    if (width <= norm_chunk) return chunks[0];
    for_chunks({0, width}, [&](int64_t c, int64_t n) {
      row.mean += chunks[c / norm_chunk].mean * (double(n) / double(width));
    });
    for_chunks({0, width}, [&](int64_t c, int64_t n) {
      const Moments& chunk = chunks[c / norm_chunk];
      const double off = chunk.mean - row.mean;
      row.squares += chunk.squares + double(n) * off * off;
    });
    return row;
  }

  // Where squares leave the range of S the row is read again, in units in which they do not; that
  // is rare, and who shares the row does it alone.
  RowStatistics statistics(int64_t row, const Moments* chunks) const {
    const double eps = p.options.eps, width = double(division.width);
    Moments total = merge(chunks);
    double variance = total.squares / width, scale = 1;
    if (!(variance < double(infinity<S>)))
      scale = shrink<S>;
    else if (variance < vanishing<S> && eps < vanishing<S>)
      scale = 1 / shrink<S>;
    if (scale == 1) [[likely]]
      return {total.mean, 1 / __builtin_sqrt(variance + eps)};
    total = rescaled(row, S(scale));
    variance = total.squares / width;
    const double rstd = 1 / __builtin_sqrt(variance + eps * scale * scale);
    return {total.mean / scale, rstd * scale};
  }

  Moments rescaled(int64_t row, S scale) const {
    Moments whole{0, 0};
    int64_t before = 0;
    for_chunks({0, division.width}, [&](int64_t c, int64_t n) {
      const P* const z = source(row, c);
      const Moments here =
          p.options.centre ? scaled_moments<true>(z, n, scale) : scaled_moments<false>(z, n, scale);
      const double off = here.mean - whole.mean, share = double(n) / double(before + n);
      whole.squares += here.squares + off * off * double(before) * share;
      whole.mean += off * share;
      before += n;
    });
    return whole;
  }

  void keep(int64_t row, const RowStatistics& s) const {
    if (p.rstd) static_cast<S*>(p.rstd.data)[row] = S(s.rstd);
    if (p.mean) static_cast<S*>(p.mean.data)[row] = S(s.mean);
  }

  // The second pass over a row with the first over one to come, whose moments take the place of its
  // own.
  void pass_on(int64_t row, int64_t next, Moments* chunks) const {
    const Range columns{0, division.width};
    if (!sums_next() && !combines_next()) {
      second_pass(row, columns, chunks);
      return first_pass(next, columns, chunks);
    }
    const RowStatistics s = statistics(row, chunks);
    keep(row, s);
    const S mean = S(s.mean), rstd = S(s.rstd);
    const bool w = weight.from(0), b = bias.from(0);
    if (p.z)
      *chunks = b ? combine_next<true>(row, mean, rstd) : combine_next<false>(row, mean, rstd);
    else if (p.options.centre)
      *chunks = w && b ? scale_and_sum<true, true, true>(row, next, mean, rstd)
                : w    ? scale_and_sum<true, false, true>(row, next, mean, rstd)
                       : scale_and_sum<false, false, true>(row, next, mean, rstd);
    else
      *chunks = w ? scale_and_sum<true, false, false>(row, next, mean, rstd)
                  : scale_and_sum<false, false, false>(row, next, mean, rstd);
  }

  void second_pass(int64_t row, Range columns, const Moments* chunks) const {
    const RowStatistics s = statistics(row, chunks);
    keep(row, s);
    scale_row(row, columns, s, weight.from(columns.begin), bias.from(columns.begin));
  }

  // With the weight and bias of these columns.
  void scale_row(int64_t row, Range columns, const RowStatistics& s, const S* w, const S* b) const {
    T* out = static_cast<T*>(p.out.data) + row * p.out.stride[0] + columns.begin;
    const int64_t n = columns.end - columns.begin;
    const P* z = source(row, columns.begin);
    const S mean = S(s.mean), rstd = S(s.rstd);
    const bool streamed = goes_past(row);
    const auto pass = [&](const auto& fetch) __attribute__((always_inline)) {
      if (w && b)
        write_vectors<S>(out, n, streamed, scaled<true, true>(z, mean, rstd, w, b), fetch);
      else if (w)
        write_vectors<S>(out, n, streamed, scaled<true, false>(z, mean, rstd, w, b), fetch);
      else
        write_vectors<S>(out, n, streamed, scaled<false, false>(z, mean, rstd, w, b), fetch);
    };
    if (!on) return pass(FetchNothing{});
    const T* x = x_row(row + on, columns.begin);
    if (!p.residual || p.residual.dtype != dtype_of<P>)
      return pass([=](int64_t i, int count) { fetch_lines(x + i, count, prefetch); });
    const P* residual =
        static_cast<const P*>(p.residual.data) + (row + on) * p.residual.stride[0] + columns.begin;
    pass([=](int64_t i, int count) {
      fetch_lines(x + i, count, prefetch);
      fetch_lines(residual + i, count, prefetch);
    });
  }
};

// One thread's rows. The first pass runs a few rows ahead of the second, so that nothing waits for
// a row's last sums; one row where z is written too and rows are long, so that memory is read in
// its order.
template <class T, class P>
static void norm_forward_rows(const NormForwardRows<T, P>& f, const Share& share,
                              Moments* moments) {
  const int64_t begin = share.rows.begin, end = share.rows.end;
  const int64_t chunks = chunks_of(f.division.width);
  const bool alone = chunks > 1 || f.combines_next() || (f.p.z && is_long<T>(f.division));
  const int64_t ahead = alone ? 1 : norm_block;
  const auto moments_of_row = [&](int64_t row) { return moments + (row - begin) % ahead * chunks; };
  int64_t row = begin;
  for (; row < begin + ahead && row < end; ++row)
    f.first_pass(row, share.columns, moments_of_row(row));
  for (; row < end; ++row) f.pass_on(row - ahead, row, moments_of_row(row));
  row = end - begin > ahead ? end - ahead : begin;
  for (; row < end; ++row) f.second_pass(row, share.columns, moments_of_row(row));
}

// One thread's columns of all rows; the threads wait for each other's sums.
template <class T, class P>
static void norm_forward_columns(const NormForwardRows<T, P>& f, const Share& share,
                                 Moments* moments) {
  typedef compute_t<T> S;
  const int64_t rows = f.division.rows, chunks = chunks_of(f.division.width);
  for (int64_t row = 0; row < rows; ++row) f.first_pass(row, share.columns, moments + row * chunks);
#pragma omp barrier
  alignas(64) S weight[norm_chunk], bias[norm_chunk];
  for (int64_t first = 0; first < rows; first += rows_at_once) {
    const int64_t n = rows - first < rows_at_once ? rows - first : rows_at_once;
    RowStatistics s[rows_at_once];
    for (int64_t r = 0; r < n; ++r) {
      s[r] = f.statistics(first + r, moments + (first + r) * chunks);
      if (share.columns.begin == 0) f.keep(first + r, s[r]);
    }
    for_chunks(share.columns, [&](int64_t c, int64_t width) {
      const Range columns{c, c + width};
      const S* const w = f.weight.chunk(columns, weight);
      const S* const b = f.bias.chunk(columns, bias);
      for (int64_t r = 0; r < n; ++r) f.scale_row(first + r, columns, s[r], w, b);
    });
  }
}

template <class T, class P>
static bool norm_forward_short(const NormForwardRows<T, P>& f, Range rows);  // norm_short.h

template <class S>
struct NormForwardShared {
  Parameter<S> weight, bias;

  FUSEDATTN_MEMBER NormForwardShared(const NormForward& p, const Division& d, Arena& arena)
      // There is no case for a bias alone, nor for none with z.
      : weight(p.weight, p.options.weight_offset, p.bias || p.z, d, arena),
        bias(p.bias, 0, false, d, arena) {}
};

// Of one thread, or of all if split.
template <class P>
struct NormForwardOwn {
  Moments* moments;
  P* z;

  FUSEDATTN_MEMBER NormForwardOwn(const NormForward& p, const Division& d, bool large,
                                  Arena& arena) {
    const int64_t rows = d.split ? d.rows : norm_block;
    moments = arena.take<Moments>(rows * chunks_of(d.width));
    const bool buffered = p.z && (large || p.z.dtype != dtype_of<P>);
    z = buffered ? arena.take<P>(rows * d.width) : nullptr;
  }
};

template <class T, class P>
static bool norm_forward_of(const NormForward& p) {
  typedef NormForwardShared<compute_t<T>> Shared;
  typedef NormForwardOwn<P> Own;
  const auto outgrow = [&](int quarters, const auto&... tensors) {
    return outgrows_caches(quarters, threads_for_elements(p.work()), p.work(), tensors...);
  };
  const bool large = outgrow(2, p.x, p.residual, p.out, p.z);
  const Division division(p.rows(), p.width(), !large);
  // With a backward pass to come out lies where nobody has lately been, and of so much of it little
  // is left nearby where the last cache is far. Else nobody knows who reads it next, and half of it
  // past the caches is nowhere far from the best.
  const bool past = !p.z && (last_cache_is_far() ? outgrow(1, p.x, p.out) : large && p.rstd);
  const RowsPast out_past = past || outgrow(2, p.out) ? RowsPast::all
                            : outgrow(1, p.out)       ? RowsPast::half
                                                      : RowsPast::none;
  const Workspace workspace(bytes_of_scratch<Shared>(p, division),
                            bytes_of_scratch<Own>(p, division, large), division.copies());
  Arena common = workspace.shared();
  const Shared shared(p, division, common);
  const Dropout dropout = p.seed ? Dropout(p.seed, p.options.dropout_p) : Dropout();
  shared.weight.convert_all(division.width);
  shared.bias.convert_all(division.width);
  const int64_t on = rows_on(outgrow(1, p.x, p.residual, p.out, p.z) && !division.split,
                             division.rows, division.width * int64_t(sizeof(T)));
  on_threads(division.threads, [&] {
    const int thread = omp_get_thread_num();
    Arena arena = workspace.own(division.split ? 0 : thread);
    const Own own(p, division, large, arena);
    const NormForwardRows<T, P> rows{p,     division, shared.weight, shared.bias, dropout,
                                     own.z, large,    out_past,      on};
    const Share share = division.share(thread);
    if (division.split)
      norm_forward_columns(rows, share, own.moments);
    else if (!norm_forward_short(rows, share.rows))
      norm_forward_rows(rows, share, own.moments);
    if (large) drain();
  });
  return true;
}

template <class T>
static bool norm_forward(const NormForward& p) {
  if (!p.z || p.z.dtype == dtype_of<T>) return norm_forward_of<T, T>(p);
  return norm_forward_of<T, compute_t<T>>(p);
}

}  // namespace fusedattn::FUSEDATTN_ISA
