// Attention for a handful of queries against many keys, as in generation.
//
// Here every key is read once and used a few times, so memory sets the pace: K and V are streamed
// as they are, unpacked. The keys of a (batch, key head) are split among tasks; each keeps a
// running (m, l, o) per query, and a second pass combines them (split-KV, "Flash-Decoding", Dao et
// al. 2023). How they are split follows from their number alone, so that neither the number of
// threads nor the rest of the batch changes a bit of the result.
#pragma once

#include "attention_softmax.h"

namespace fusedattn::FUSEDATTN_ISA {

template <class T>
class Decode {
  typedef compute_t<T> S;
  static constexpr int w = width<S>;
  static constexpr int64_t block = 512;        // keys at a time: K and V in turn, in long runs
  static constexpr int64_t most_queries = 8;   // per key head
  static constexpr int64_t least_split = 256;  // keys worth a task of their own
  static constexpr int64_t most_splits = 64;
  static constexpr int64_t addends = 128;  // keys whose values are added up by themselves
  static constexpr int held = 8;           // vectors of an output row kept in registers
  static constexpr int64_t ahead = 16;     // rows of K and V asked for before they are needed

  // Rows of K or V, one after the other or wherever a page has them.
  struct InStep {
    const T* first;
    int64_t step;
    FUSEDATTN_MEMBER const T* operator[](int64_t j) const { return first + j * step; }
    FUSEDATTN_MEMBER InStep from(int64_t j) const { return {first + j * step, step}; }
  };
  struct InPages {
    const T* const* rows;
    FUSEDATTN_MEMBER const T* operator[](int64_t j) const { return rows[j]; }
    FUSEDATTN_MEMBER InPages from(int64_t j) const { return {rows + j}; }
  };

  const AttentionForward& f;
  const Scores<S> scores;
  const int64_t d, dv, rows, pairs;  // rows: of the sequence with most, of one key head
  const int64_t splits;              // at most, of any sequence

 public:
  Decode(const AttentionForward& f, const Lengths& lengths)
      : f(f),
        scores(f),
        d(f.head_dim()),
        dv(f.head_dim_v()),
        rows(f.group() * lengths.q),
        pairs(f.sequences() * f.heads_kv()),
        splits(smaller((lengths.k + least_split - 1) / least_split, most_splits)) {}

  // Whole vectors of contiguous elements, and few queries of a sequence.
  static bool takes(const AttentionForward& f, int64_t queries) {
    return f.group() * queries <= most_queries && f.head_dim() % w == 0 &&
           f.head_dim_v() % w == 0 && f.k.stride[3] == 1 && f.v.stride[3] == 1;
  }

  void run(int threads) {
    const int64_t partial = rows * (dv + 2);
    Arena count;
    count.take<S>(pairs * splits * partial);
    const size_t shared = count.used();
    count.take<S>(rows * d);
    count.take<S>(2 * block);
    count.take<uint8_t>(block + dropout_step);
    if (f.block_table) count.take<const T*>(2 * (block + ahead));
    const size_t own = count.used() - shared;
    const Workspace workspace(shared, own, threads);
    S* const partials = workspace.shared().template take<S>(pairs * splits * partial);
    on_threads(threads, [&] {
      Arena arena = workspace.own(omp_get_thread_num());
      S* const q = arena.take<S>(rows * d);
      S* const s = arena.take<S>(2 * block);
      uint8_t* const keep = arena.take<uint8_t>(block + dropout_step);
      const T** const rows_at = f.block_table ? arena.take<const T*>(2 * (block + ahead)) : nullptr;
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < pairs * splits; ++task)
        stream(task / splits, task % splits, q, s, keep, rows_at, partials + task * partial);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < pairs * rows; ++task)
        combine(task / rows, task % rows, partials + task / rows * splits * partial, partial);
    });
  }

 private:
  // From the first that any query sees; those after the last are few.
  static int64_t visible(const Sequence<int64_t>& sequence) {
    return sequence.seq_k - sequence.begin(0);
  }

  // How many of n keys a task takes.
  static int64_t keys_each(int64_t n) {
    return larger(round_up((n + most_splits - 1) / most_splits, w), least_split);
  }

  // A row that the hardware's own prefetch, which stops at page ends, would fetch late.
  FUSEDATTN_INLINE void prefetch(const T* row, int64_t n) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t i = 0; i < n; i += line) __builtin_prefetch(row + i);
  }

  // Row r of a key head's is query i of head h; none of a sequence that another kernel takes.
  struct Row {
    int64_t h, i;
  };
  int64_t rows_of(const Sequence<int64_t>& sequence) const {
    return takes(f, sequence.seq_q) ? f.group() * sequence.seq_q : 0;
  }
  Row row_of(const Sequence<int64_t>& sequence, int64_t pair, int64_t r) const {
    return {pair % f.heads_kv() * f.group() + r / sequence.seq_q, r % sequence.seq_q};
  }

  // One split of the keys: m, l and the unnormalised output of every row, into `partial`.
  void stream(int64_t pair, int64_t split, S* q, S* s, uint8_t* keep, const T** rows_at,
              S* partial) const {
    const int64_t b = pair / f.heads_kv(), h = pair % f.heads_kv();
    const Sequence<int64_t> sequence = f.sequence(b);
    const int64_t own = rows_of(sequence), each = keys_each(visible(sequence));
    const int64_t first = sequence.begin(0) + split * each;
    const int64_t end = smaller(sequence.seq_k, first + each);
    if (first >= end || own == 0) return;
    S *m = partial, *l = partial + rows, *o = partial + 2 * rows;
    memset(o, 0, rows * dv * sizeof(S));
    for (int64_t r = 0; r < own; ++r) {
      m[r] = -infinity<S>;
      l[r] = 0;
      const Row row = row_of(sequence, pair, r);
      const Source<T> from = source<T>(f.q, b, row.h, sequence.query_row(row.i));
      load_row(from.data, from.column, d, q + r * d, d);
    }
    for (int64_t j0 = first; j0 < end; j0 += block) {
      const int64_t past = smaller(j0 + block, end);
      const auto attend = [&](const auto& k, const auto& v) {
        for (int64_t r = 0; r < own; ++r) {
          const auto [head, i] = row_of(sequence, pair, r);
          const int64_t j = larger(j0, sequence.begin(i));
          const int64_t seen = smaller(sequence.end(i), past) - j;
          if (seen <= 0 || !scores.mask.shows(b, head, i, j, seen)) continue;
          multiply_keys(q + r * d, k.from(j - j0), seen, s);
          if (scores.rewrite) scores.prepare(s, sequence, b, head, i, j, seen, s + block);
          scores.mask.apply(s, b, head, i, j, seen);
          S* row = o + r * dv;
          const S origin = raise_maximum<Fma<S>>(scores, s, seen, m[r], l[r], row, dv);
          const Rows<S> p{s, block, block};
          const int64_t wide = round_up(seen, 2 * w);
          if (scores.dropout) {
            const int64_t before = j % 4;  // keys that share a counter with the first one
            scores.keep(b, head, i, j - before, before + seen, keep);
            l[r] += probabilities<Fma<S>, true>(s, seen, wide, scores.factor, origin, p, 0,
                                                keep + before);
          } else {
            l[r] +=
                probabilities<Fma<S>, false>(s, seen, wide, scores.factor, origin, p, 0, nullptr);
          }
          add_values(s, v.from(j - j0), seen, row);
        }
      };
      if (rows_at != nullptr) {
        const T **k = rows_at, **v = rows_at + block + ahead;
        find_rows(f.k, b, h, j0, past, k);
        find_rows(f.v, b, h, j0, past, v);
        attend(InPages{k}, InPages{v});
      } else {
        const int64_t first_row = sequence.key_row(j0);
        attend(InStep{f.k.at<const T>(b, h, first_row), f.k.stride[2]},
               InStep{f.v.at<const T>(b, h, first_row), f.v.stride[2]});
      }
    }
  }

  // Where keys [j0, past) lie, and the first ones after them again, for those who look ahead.
  void find_rows(const TensorView& x, int64_t b, int64_t h, int64_t j0, int64_t past,
                 const T** at) const {
    for (int64_t j = j0; j < past;) {
      const int64_t run = smaller(f.page_rows - j % f.page_rows, past - j);
      const T* row = f.template paged_row<T>(x, b, h, j);
      for (int64_t c = 0; c < run; ++c, ++j, row += x.stride[2]) at[j - j0] = row;
    }
    for (int64_t c = 0; c < ahead; ++c) at[past - j0 + c] = at[past - j0 - 1];
  }

  // s[j] = q · k_j for n keys, one vector's width of them at a time: the sums of their lanes are
  // taken together by a transpose.
  template <class Keys>
  FUSEDATTN_MEMBER void multiply_keys(const S* q, const Keys& k, int64_t n, S* s) const {
    alignas(64) S lanes[w * w];
    for (int64_t j = 0; j < n; j += w) {
      const int64_t here = smaller(w, n - j);
      for (int64_t c = 0; c < here; ++c) {
        const T* key = k[j + c];
        prefetch(k[j + c + ahead], d);
        vec<S> even{}, odd{};
        int64_t i = 0;
        for (; i + 2 * w <= d; i += 2 * w) {
          even += load(q + i) * load_as(key + i);
          odd += load(q + i + w) * load_as(key + i + w);
        }
        if (i < d) even += load(q + i) * load_as(key + i);
        store(lanes + c * w, even + odd);
      }
      transpose_square(lanes, w, lanes, w);
      vec<S> sum = load(lanes);
      for (int i = 1; i < w; ++i) sum += load(lanes + i * w);
      store(s + j, sum);
    }
  }

  // o += Σ p_j v_j, a few keys at a time, so that no chain of additions is long.
  template <class Values>
  FUSEDATTN_MEMBER void add_values(const S* p, const Values& v, int64_t n, S* o) const {
    for (int64_t j = 0; j < n; j += addends) {
      const int64_t here = smaller(addends, n - j);
      const Values rows_of_v = v.from(j);
      int64_t i = 0;
      for (; i + held * w <= dv; i += held * w) add_columns<held>(p + j, rows_of_v, i, here, o + i);
      for (; i < dv; i += w) add_columns<1>(p + j, rows_of_v, i, here, o + i);
    }
  }

  // Columns i … i + N · w of them.
  template <int N, class Values>
  FUSEDATTN_MEMBER void add_columns(const S* p, const Values& v, int64_t i, int64_t n, S* o) const {
    vec<S> sum[N] = {};
    for (int64_t j = 0; j < n; ++j) {
      const T* row = v[j] + i;
      prefetch(v[j + ahead] + i, N * w);
      const vec<S> weight = splat(p[j]);
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) sum[c] += weight * load_as(row + c * w);
    }
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) store(o + c * w, load(o + c * w) + sum[c]);
  }

  // Bring the splits of one row to their common maximum, add them up and write the row.
  void combine(int64_t pair, int64_t r, S* partials, int64_t stride) const {
    const int64_t b = pair / f.heads_kv();
    const Sequence<int64_t> sequence = f.sequence(b);
    if (r >= rows_of(sequence)) return;
    const int64_t n = visible(sequence), each = keys_each(n), used = (n + each - 1) / each;
    S m = -infinity<S>, l = 0;
    for (int64_t k = 0; k < used; ++k) {
      const S of_split = partials[k * stride + r];
      m = of_split > m ? of_split : m;
    }
    S* const total = partials + 2 * rows + r * dv;
    for (int64_t k = 0; k < used; ++k) {
      const S* partial = partials + k * stride;
      const S of_split = partial[r];
      const S factor = of_split == -infinity<S>
                           ? S(1)
                           : scores.template carried<Fma<S>::exp2_degree>(of_split, m);
      l += partial[rows + r] * factor;
      const S* row = partial + 2 * rows + r * dv;
      for (int64_t i = 0; i < dv; i += w) {
        const vec<S> x = load(row + i) * factor;
        store(total + i, k == 0 ? x : load(total + i) + x);
      }
    }
    const Row row = row_of(sequence, pair, r);
    write_row<T>(scores, b, row.h, sequence.query_row(row.i), m, l, total);
  }
};

}  // namespace fusedattn::FUSEDATTN_ISA
