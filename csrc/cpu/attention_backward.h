// Attention's backward pass on packed operands, any engine.
//
// A task owns every `splits`-th block of keys of one (batch, key head) and goes over all queries
// that see it, so dK and dV are summed in the task's own memory; dQ is summed per split and added
// up in a fixed order at the end, which makes the result repeatable. With p = 2^(s − lse), per
// tile:
//
//     s = q kᵀ     dp = dO vᵀ     ds = p ∘ (dp − Δ),  Δ = rowsum(dO ∘ O) − dlse
//     dvᵀ += dOᵀ p     dkᵀ += qᵀ ds     dq += ds k
//
// Dropout changes dp, and p in the sum of dV. What it multiplies dV by comes at the end. The
// gradient of a bias is ds, before a softcap bends it. What is not wanted is not multiplied.
//
// The transposed sums let p and ds be the right-hand operand just as they leave the registers.
#pragma once

#include "attention_backward_operands.h"
#include "attention_bias_sums.h"
#include "attention_distance_sums.h"

namespace fusedattn::FUSEDATTN_ISA {

// A thread's buffers.
template <class E>
struct BackwardScratch {
  typedef stat_of<E> S;
  typedef unit_of<E> Unit;
  typedef BackwardBlocks<E> Blocks;
  S *s, *dp, *dkt, *dvt, *row;
  S* slope = nullptr;  // of the scores, where that is not 1
  uint8_t* keep;       // which weights of two rows survive dropout
  Panels<Unit> p, ds;
  Rows<Unit> ds_rows;
  Unit* strip;

  BackwardScratch(const BackwardOperands<E>& x, Arena& arena) {
    constexpr int64_t tile = Blocks::queries * Blocks::keys / E::per_unit;
    s = arena.take<S>(Blocks::strip * Blocks::keys);
    dp = arena.take<S>(Blocks::strip * Blocks::keys);
    if (x.f.options.softcap > 0) slope = arena.take<S>(Blocks::strip * Blocks::keys);
    keep = arena.take<uint8_t>(2 * Blocks::keys);
    dkt = arena.take<S>(x.rows_d * Blocks::keys);
    dvt = arena.take<S>(x.rows_dv * Blocks::keys);
    row = arena.take<S>(larger(Blocks::keys, larger(x.rows_d, x.rows_dv) * width<S>));
    p = {arena.take<Unit>(E::planes * tile), Blocks::queries / E::per_unit, tile};
    ds = {arena.take<Unit>(E::planes * tile), Blocks::queries / E::per_unit, tile};
    ds_rows = {arena.take<Unit>(E::planes * tile), Blocks::keys / E::per_unit, tile};
    strip = arena.take<Unit>(x.scratch_units());
  }
};

// What the threads that work on one (batch, key head) share.
template <class E>
struct BackwardPair {
  unit_of<E>* packed;
  stat_of<E>*statistics, *dq;
  stat_of<E>* dbias;  // one thread's alone, where the bias has its gradient here
};

// What one row of a tile needs to become probabilities and score gradients.
template <class S>
struct RowStatistics {
  int64_t seen;
  S lse, delta;
  S* dbias = nullptr;  // where ds is added to, if anywhere
  S* ddistance = nullptr;
};

// Two rows of a tile: scores, dp and, where `bent`, slopes in, p and ds out as operands. Where
// `dropped`, what t.keep keeps of dp is multiplied by `kept`.
template <bool bent, bool dropped, class E>
FUSEDATTN_INLINE void gradient_rows(int64_t from, int64_t wide, stat_of<E> factor, stat_of<E> kept,
                                    const RowStatistics<stat_of<E>> (&row)[2], int64_t i,
                                    const BackwardScratch<E>& t) {
  typedef stat_of<E> S;
  constexpr int w = width<S>;
  constexpr int64_t ld = BackwardBlocks<E>::keys;
  const int64_t whole = smaller(row[0].seen, row[1].seen) / (2 * w) * (2 * w);
  const int64_t any = smaller(round_up(larger(row[0].seen, row[1].seen), 2 * w), wide);
  vec<S> p[2][2], ds[2][2];
  const auto put = [&](int64_t j) __attribute__((always_inline)) {
    E::put_across(t.p, i, j, p[0][0], p[1][0]);
    E::put_across(t.p, i, j + w, p[0][1], p[1][1]);
    E::put_across(t.ds, i, j, ds[0][0], ds[1][0]);
    E::put_across(t.ds, i, j + w, ds[0][1], ds[1][1]);
    E::put_along(t.ds_rows, i, j, ds[0][0], ds[0][1]);
    E::put_along(t.ds_rows, i + 1, j, ds[1][0], ds[1][1]);
  };
  for (int64_t j = 0; j < any; j += 2 * w) {
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const int64_t at = from + r * ld + j + c * w;
        p[r][c] = exp2<E::exp2_degree>(load(t.s + at) * factor - row[r].lse);
        vec<S> dp = load(t.dp + at);
        [[maybe_unused]] const uint8_t* const keep = t.keep + r * ld + j + c * w;
        if constexpr (dropped) dp = select_bytes<S>(keep, dp * kept, vec<S>{});
        ds[r][c] = p[r][c] * (dp - row[r].delta);
        if constexpr (dropped) p[r][c] = select_bytes<S>(keep, p[r][c], vec<S>{});
      }
    if (j >= whole) {
      for (int r = 0; r < 2; ++r)
        for (int c = 0; c < 2; ++c) {
          const int left = int(row[r].seen - j - c * w);
          p[r][c] = select_below(left, p[r][c], vec<S>{});
          ds[r][c] = select_below(left, ds[r][c], vec<S>{});
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        for (S* const sums : {row[r].dbias, row[r].ddistance})
          if (sums != nullptr) store(sums + j + c * w, load(sums + j + c * w) + ds[r][c]);
        if constexpr (bent) {
          const vec<S> slope = load(t.slope + from + r * ld + j + c * w);
          ds[r][c] *= select_below(int(smaller(row[r].seen - j - c * w, w)), slope, vec<S>{});
        }
      }
    put(j);
  }
  for (auto& x : p) x[0] = x[1] = vec<S>{};
  for (auto& x : ds) x[0] = x[1] = vec<S>{};
  for (int64_t j = any; j < wide; j += 2 * w) put(j);
}

// dst rows [0, n) get the transpose of src[columns][n] times factor.
template <class S, class T>
static void store_transposed(const S* src, int64_t ld, int64_t n, int64_t columns, S factor,
                             const TensorView& dst, int64_t b, int64_t h, int64_t first, S* rows) {
  constexpr int w = width<S>;
  const int64_t padded = round_up(columns, w);
  for (int64_t j = 0; j < n; j += w) {
    for (int64_t c = 0; c < padded; c += w)
      transpose_square(src + c * ld + j, ld, rows + c, padded);
    for (int64_t r = 0; r < smaller(n - j, w); ++r)
      store_row(dst.at<T>(b, h, first + j + r), dst.stride[3], columns, rows + r * padded, factor);
  }
}

template <class E, class T>
class BackwardTask {
  typedef stat_of<E> S;
  typedef unit_of<E> Unit;
  typedef BackwardBlocks<E> Blocks;
  const BackwardOperands<E>& x;
  const Scores<S>& scores;
  const BackwardScratch<E>& t;
  const BiasSums<S>& sums;
  const DistanceSums<S>& distances;
  const BackwardPair<E> memory;
  S* dq;         // of the split
  int64_t b, h;  // batch entry and key head
  int64_t split = 0;
  const Sequence<int64_t> sequence;

 public:
  BackwardTask(const BackwardOperands<E>& x, const Scores<S>& scores, const BackwardScratch<E>& t,
               const BiasSums<S>& sums, const DistanceSums<S>& distances,
               const BackwardPair<E>& memory, S* dq, int64_t pair)
      : x(x),
        scores(scores),
        t(t),
        sums(sums),
        distances(distances),
        memory(memory),
        dq(dq),
        b(pair / x.f.heads_kv()),
        h(pair % x.f.heads_kv()),
        sequence(x.f.sequence(b)) {}

  void run(int64_t own_split, int64_t splits) {
    const AttentionBackward& f = x.f;
    const int64_t n = sequence.seq_k, all = sequence.rows_k();
    split = own_split;
    for (int64_t g = 0; g < x.group; ++g) {
      memset(dq + g * x.dq_rows() * x.wide_d, 0,
             round_up(sequence.seq_q, Blocks::padding) * x.wide_d * sizeof(S));
      if (distances) distances.clear(split, b, h * x.group + g, sequence);
    }
    for (int64_t j = split; j * Blocks::keys < all; j += splits) {
      const int64_t j0 = j * Blocks::keys, rows = smaller(Blocks::keys, all - j0);
      const int64_t first = sequence.key_row(j0);
      memset(t.dkt, 0, x.rows_d * Blocks::keys * sizeof(S));
      memset(t.dvt, 0, x.rows_dv * Blocks::keys * sizeof(S));
      if (j0 < n) {
        const int64_t columns = smaller(Blocks::keys, n - j0);
        const int64_t past = sequence.past_query(j0 + columns - 1);
        for (int64_t g = 0; g < x.group; ++g)
          for (int64_t i = sequence.first_query(j0) / Blocks::queries; i * Blocks::queries < past;
               ++i)
            tile(g, i, j, j0, columns);
      }
      if (f.dk)
        store_transposed<S, T>(t.dkt, Blocks::keys, rows, x.d, S(f.options.scale), f.dk, b, h,
                               first, t.row);
      if (f.dv)
        store_transposed<S, T>(t.dvt, Blocks::keys, rows, x.dv, S(scores.dropout.factor), f.dv, b,
                               h, first, t.row);
    }
  }

 private:
  void tile(int64_t g, int64_t i, int64_t j, int64_t j0, int64_t columns) {
    constexpr int w = width<S>;
    const int64_t i0 = i * Blocks::queries, rows = smaller(Blocks::queries, sequence.seq_q - i0);
    const int64_t head = h * x.group + g;
    const int64_t last =
        scores.mask.cut(b, head, i0, rows, j0, smaller(sequence.end(i0 + rows - 1) - j0, columns));
    if (last <= 0) return;
    const int64_t wide = round_up(last, 2 * w), padded = round_up(rows, Blocks::padding);
    Unit* queries = x.queries(memory.packed, g, i);
    Unit* keys = x.keys(memory.packed, j);
    const int64_t deep = round_up(x.d, E::depth_step), deep_v = round_up(x.dv, E::depth_step);
    for (int64_t r = 0; r < padded; r += Blocks::strip) {
      const int64_t here = smaller(rows - r, Blocks::strip);
      const int64_t multiplied = round_up(here, E::row_step);
      E::multiply(multiplied, wide, deep, x.q(queries).from(r), x.kt(keys), t.s, Blocks::keys,
                  false);
      E::multiply(multiplied, wide, deep_v, x.o(queries).from(r), x.vt(keys), t.dp, Blocks::keys,
                  false);
      for (int64_t k = 0; k < smaller(Blocks::strip, padded - r); k += 2) {
        RowStatistics<S> row[2];
        for (int64_t c = 0; c < 2; ++c) {
          row[c] = statistics_of(g, i0 + r + k + c, j0, last);
          const int64_t query = i0 + r + k + c;
          if (row[c].seen <= 0) continue;
          if (sums) row[c].dbias = sums.row(memory.dbias, g, query) + j0;
          if (distances) row[c].ddistance = distances.row(split, b, head, sequence, query) + j0;
        }
        const auto gradient = [&]<bool bent, bool dropped>() {
          gradient_rows<bent, dropped>(k * Blocks::keys, wide, scores.factor,
                                       S(scores.dropout.factor), row, r + k, t);
        };
        if (scores.dropout) {
          for (int64_t c = 0; c < 2; ++c)
            scores.keep(b, h * x.group + g, i0 + r + k + c, j0, row[c].seen,
                        t.keep + c * Blocks::keys);
          t.slope == nullptr ? gradient.template operator()<false, true>()
                             : gradient.template operator()<true, true>();
        } else {
          t.slope == nullptr ? gradient.template operator()<false, false>()
                             : gradient.template operator()<true, false>();
        }
      }
    }
    if (x.f.dv) E::multiply(x.rows_dv, wide, padded, x.ot(queries), t.p, t.dvt, Blocks::keys, true);
    if (x.f.dk) E::multiply(x.rows_d, wide, padded, x.qt(queries), t.ds, t.dkt, Blocks::keys, true);
    if (x.f.dq)
      E::multiply(round_up(rows, E::row_step), round_up(x.d, w), wide, t.ds_rows, x.kn(keys),
                  dq + (g * x.dq_rows() + i0) * x.wide_d, x.wide_d, true);
  }

  // Also applies bias and mask to the row's scores.
  RowStatistics<S> statistics_of(int64_t g, int64_t i, int64_t j0, int64_t last) {
    if (i >= sequence.seq_q) return {0, 0, 0};
    const S* of_head = memory.statistics + g * 2 * x.longest_q;
    const S lse = of_head[i], delta = of_head[x.longest_q + i];
    const int64_t head = h * x.group + g;
    const int64_t seen =
        scores.mask.cut(b, head, i, 1, j0, larger(smaller(sequence.end(i) - j0, last), 0));
    if (lse == -infinity<S>) return {0, 0, 0};
    const int64_t at = i % Blocks::queries % Blocks::strip * Blocks::keys;
    S* const s = t.s + at;
    if (scores.rewrite)
      scores.prepare(s, sequence, b, head, i, j0, seen, t.row,
                     t.slope == nullptr ? nullptr : t.slope + at);
    scores.mask.apply(s, b, head, i, j0, seen);
    scores.hide(s, smaller(sequence.begin(i) - j0, seen));
    if (scores.is_near(lse)) return {seen, scores.shift(lse), delta};
    scores.rebase(s, seen, lse, 0);  // the forward may have added up its products otherwise
    return {seen, 0, delta};
  }
};

// dq = scale · Σ over splits, in order.
template <class E, class T>
static void store_dq(const BackwardOperands<E>& x, int64_t pair, int64_t g, int64_t i,
                     stat_of<E>* sums, int64_t splits, int64_t split_stride) {
  typedef stat_of<E> S;
  const AttentionBackward& f = x.f;
  const int64_t b = pair / f.heads_kv();
  const Sequence<int64_t> sequence = f.sequence(b);
  if (!f.dq || i >= sequence.seq_q) return;
  S* total = sums + (g * x.dq_rows() + i) * x.wide_d;
  for (int64_t split = 1; split < splits; ++split)
    for (int64_t c = 0; c < x.d; c += width<S>)
      store(total + c, load(total + c) + load(total + split * split_stride + c));
  const int64_t head = pair % f.heads_kv() * x.group + g;
  store_row(f.dq.at<T>(b, head, sequence.query_row(i)), f.dq.stride[3], x.d, total,
            S(f.options.scale));
}

// bias_done: whether dbias, if wanted, was written as well.
template <class E, class T>
static bool attention_backward(const AttentionBackward& f, bool& bias_done) {
  typedef stat_of<E> S;
  typedef unit_of<E> Unit;
  Scores<S> scores(f);
  const Lengths lengths(f, [](int64_t) { return true; });
  const BackwardOperands<E> x(f, lengths);
  const int64_t pairs = f.sequences() * f.heads_kv();
  const int threads = threads_for(f, lengths);
  const int64_t dq_bytes = x.dq_size() * int64_t(sizeof(S));
  const int64_t pair_bytes =
      x.units() * int64_t(sizeof(Unit)) + x.statistics() * int64_t(sizeof(S)) + dq_bytes;
  const BiasSums<S> sums(f, threads);
  bias_done = bool(sums);
  if (!sums && !f.dq && !f.dk && !f.dv && !f.ddistance_bias) return true;
  const bool apart = sums || pairs_apart(f, lengths, threads, pair_bytes);
  // Threads that share a pair split its blocks of keys, within the memory of the partial dq.
  constexpr int64_t most_dq_bytes = int64_t{24} << 20;
  const int64_t wanted = apart ? 1 : threads;
  const int64_t fitting = most_dq_bytes / larger(dq_bytes, 1);
  const int64_t splits = larger(smaller(smaller(wanted, x.blocks_k), fitting), 1);
  DistanceSums<S> distances(f, splits);

  Arena count;
  const auto take_shared = [&](Arena& arena) {
    Unit* const packed = arena.take<Unit>(x.units());
    S* const statistics = arena.take<S>(x.statistics());
    S* const dq = arena.take<S>(splits * x.dq_size());
    return BackwardPair<E>{packed, statistics, dq, sums ? arena.take<S>(sums.size()) : nullptr};
  };
  scores.mask.take(count);
  distances.take(count);
  if (!apart) take_shared(count);
  const size_t shared = count.used();
  (void)BackwardScratch<E>(x, count);
  if (apart) take_shared(count);
  const size_t own = count.used() - shared;
  const Workspace workspace(shared, own, threads);
  Arena all = workspace.shared();
  scores.mask.take(all);
  distances.take(all);
  bool good = true;

#pragma omp parallel num_threads(threads) reduction(&& : good)
  {
    [[maybe_unused]] const typename E::Scope scope;
    Arena common = all;
    Arena mine = workspace.own(omp_get_thread_num());
    const BackwardScratch<E> scratch(x, mine);
    const BackwardPair<E> memory = take_shared(apart ? mine : common);
    const int64_t packs = x.blocks_k + x.group * x.blocks_q;
    const auto pack = [&](int64_t pair, int64_t task) {
      const int64_t b = pair / f.heads_kv(), h = pair % f.heads_kv();
      if (task < x.blocks_k)
        return x.template pack_keys<T>(b, h, task, memory.packed, scratch.strip);
      const int64_t g = (task - x.blocks_k) / x.blocks_q, i = (task - x.blocks_k) % x.blocks_q;
      return x.template pack_queries<T>(b, h * x.group + g, g, i, memory.packed,
                                        memory.statistics + g * 2 * x.longest_q, scratch.strip);
    };
    const auto differentiate = [&](int64_t pair, int64_t split) {
      BackwardTask<E, T>(x, scores, scratch, sums, distances, memory,
                         memory.dq + split * x.dq_size(), pair)
          .run(split, splits);
    };
    const auto finish = [&](int64_t pair, int64_t row) {
      store_dq<E, T>(x, pair, row / x.longest_q, row % x.longest_q, memory.dq, splits, x.dq_size());
    };
    const int64_t rows = x.group * x.longest_q;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < scores.mask.tasks(); ++i) scores.mask.run(i);
    if (apart) {
#pragma omp for schedule(dynamic)
      for (int64_t unit = 0; unit < sums.units(); ++unit) {
        if (sums) sums.clear(memory.dbias);
        for (int64_t n = 0; n < sums.pairs_of_unit(); ++n) {
          const int64_t pair = sums.pair(unit, n);
          for (int64_t task = 0; task < packs; ++task) good &= pack(pair, task);
          differentiate(pair, 0);
          for (int64_t row = 0; row < rows; ++row) finish(pair, row);
        }
        if (sums) sums.write(unit, memory.dbias);
      }
    } else {
      for (int64_t pair = 0; pair < pairs; ++pair) {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < packs; ++task) good &= pack(pair, task);
#pragma omp for schedule(dynamic)
        for (int64_t split = 0; split < splits; ++split) differentiate(pair, split);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) finish(pair, row);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < distances.tasks(); ++i) distances.write(i);
  }
  if (f.cu_seqlens_q) {
    if (f.dq) fill_rows<T>(f.dq, f.packed_q(f.sequences()), 0);
    if (f.dk) fill_rows<T>(f.dk, f.packed_k(f.sequences()), 0);
    if (f.dv) fill_rows<T>(f.dv, f.packed_k(f.sequences()), 0);
  }
  return good;
}

}  // namespace fusedattn::FUSEDATTN_ISA
