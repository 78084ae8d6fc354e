// Attention for a handful of queries against many keys, as in generation.
//
// Here every key is read once and used a few times, so memory sets the pace: K and V are streamed
// as they are, unpacked and in the order in which they lie, and the queries of a key head that see
// the same keys take them together. The keys are split among tasks; each keeps a running (m, l, o)
// per query, and a second pass combines them (split-KV, "Flash-Decoding", Dao et al. 2023). How
// they are split follows from their number alone, so that neither the number of threads nor the
// rest of the batch changes a bit of the result.
#pragma once

#include "attention_softmax.h"
#include "prefetch.h"

namespace fusedattn::FUSEDATTN_ISA {

template <class T>
class Decode {
  typedef compute_t<T> S;
  static constexpr int w = width<S>;
  static constexpr int64_t block = 64;         // keys at a time: K and V in turn
  static constexpr int64_t most_queries = 8;   // per key head
  static constexpr int64_t least_split = 256;  // keys worth a task of their own
  static constexpr int64_t most_splits = 64;
  static constexpr int64_t addends = 16;  // keys whose values are added up by themselves
  static constexpr int together = 4;      // queries, at most
  static constexpr int held = 8;          // sums kept in registers
  static constexpr int64_t ahead = 16;    // rows of K and V asked for before they are needed
  static constexpr int64_t page = 4096;   // bytes: rows of several heads within it go together

  // Rows of K or V of a head, one after the other or wherever a page has them.
  struct InStep {
    const T* first;
    int64_t step, head;
    FUSEDATTN_MEMBER const T* operator[](int64_t j) const { return first + j * step; }
    FUSEDATTN_MEMBER InStep from(int64_t j) const { return {first + j * step, step, head}; }
    FUSEDATTN_MEMBER InStep beside(int64_t c) const { return {first + c * head, step, head}; }
  };
  struct InPages {
    const T* const* rows;
    int64_t offset, head;
    FUSEDATTN_MEMBER const T* operator[](int64_t j) const { return rows[j] + offset; }
    FUSEDATTN_MEMBER InPages from(int64_t j) const { return {rows + j, offset, head}; }
    FUSEDATTN_MEMBER InPages beside(int64_t c) const { return {rows, offset + c * head, head}; }
  };

  const AttentionForward& f;
  const Scores<S> scores;
  const int64_t d, dv, rows;  // rows: of the sequence with most, of one key head
  const int64_t heads;        // of keys
  const int64_t splits;       // at most, of any sequence
  const int64_t partial;      // what a split leaves of the rows of a head: m, l and o
  int64_t bunch = 1;          // heads of a task

 public:
  Decode(const AttentionForward& f, const Lengths& lengths)
      : f(f),
        scores(f),
        d(f.head_dim()),
        dv(f.head_dim_v()),
        rows(f.group() * lengths.q),
        heads(f.heads_kv()),
        splits(smaller((lengths.k + least_split - 1) / least_split, most_splits)),
        partial(rows * (dv + 2)) {}

  // Whole vectors of contiguous elements, and few queries of a sequence.
  static bool takes(const AttentionForward& f, int64_t queries) {
    return f.group() * queries <= most_queries && f.head_dim() % w == 0 &&
           f.head_dim_v() % w == 0 && f.k.stride[3] == 1 && f.v.stride[3] == 1;
  }

  void run(int threads) {
    const int64_t sequences = f.sequences();
    bunch = heads_side_by_side();
    while (bunch > 1 && sequences * splits * ((heads + bunch - 1) / bunch) < 2 * threads)
      bunch = (bunch + 1) / 2;  // no thread without a task
    const int64_t bunches = (heads + bunch - 1) / bunch;
    Arena count;
    count.take<S>(sequences * heads * splits * partial);
    const size_t shared = count.used();
    take(count);
    const Workspace workspace(shared, count.used() - shared, threads);
    S* const partials = workspace.shared().template take<S>(sequences * heads * splits * partial);
    on_threads(threads, [&] {
      Arena arena = workspace.own(omp_get_thread_num());
      const Own own = take(arena);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < sequences * bunches * splits; ++task) {
        const int64_t split = task % splits, b = task / splits / bunches;
        const int64_t h = task / splits % bunches * bunch;
        stream(b, h, split, own, partials + ((b * heads + h) * splits + split) * partial);
      }
#pragma omp for schedule(static)
      for (int64_t task = 0; task < sequences * heads * rows; ++task)
        combine(task / rows, task % rows, partials + task / rows * splits * partial);
    });
  }

 private:
  // What a thread works in: the queries of a bunch, their scores of a block and room beside them.
  struct Own {
    S *q, *s, *beside;
    uint8_t* keep;
    const T** at;  // of keys, then of values
  };
  Own take(Arena& arena) const {
    return {arena.take<S>(bunch * rows * d), arena.take<S>(bunch * together * block),
            arena.take<S>(block), arena.take<uint8_t>(block + dropout_step),
            f.block_table ? arena.take<const T*>(2 * (block + ahead)) : nullptr};
  }

  // So many that their rows of a key are worth reading in one go.
  int64_t heads_side_by_side() const {
    if (f.k.stride[1] > f.k.stride[2] || f.v.stride[1] > f.v.stride[2]) return 1;
    return smaller(larger(page / (d * int64_t(sizeof(T))), 1), heads);
  }

  // From the first that any query sees; those after the last are few.
  static int64_t visible(const Sequence<int64_t>& sequence) {
    return sequence.seq_k - sequence.begin(0);
  }

  // How many of n keys a task takes.
  static int64_t keys_each(int64_t n) {
    return larger(round_up((n + most_splits - 1) / most_splits, w), least_split);
  }

  // A row that the hardware's own prefetch, which stops at page ends, would fetch late.
  FUSEDATTN_INLINE void prefetch_row(const T* row, int64_t n) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t i = 0; i < n; i += line) prefetch(row + i);
  }

  // A row of n elements into the order of `load_pair`, and back into its own.
  FUSEDATTN_INLINE void into_pairs(S* row, int64_t n) {
    if constexpr (std::is_same_v<T, bf16>)
      for (int64_t i = 0; i + 2 * w <= n; i += 2 * w) {
        S pair[2 * w];
        for (int c = 0; c < 2 * w; ++c) pair[c % 2 * w + c / 2] = row[i + c];
        memcpy(row + i, pair, sizeof pair);
      }
  }
  FUSEDATTN_INLINE void out_of_pairs(S* row, int64_t n) {
    if constexpr (std::is_same_v<T, bf16>)
      for (int64_t i = 0; i + 2 * w <= n; i += 2 * w) {
        vec<S> low, high;
        interleave_vectors(load(row + i), load(row + i + w), low, high,
                           std::make_integer_sequence<int, w>());
        store(row + i, low);
        store(row + i + w, high);
      }
  }

  // Row r of a key head's is query i of head h; none of a sequence that another kernel takes.
  struct Row {
    int64_t h, i;
  };
  struct Span {  // keys [begin, end)
    int64_t begin, end;
    bool operator==(const Span&) const = default;
  };
  int64_t rows_of(const Sequence<int64_t>& sequence) const {
    return takes(f, sequence.seq_q) ? f.group() * sequence.seq_q : 0;
  }
  Row row_of(const Sequence<int64_t>& sequence, int64_t h, int64_t r) const {
    return {h * f.group() + r / sequence.seq_q, r % sequence.seq_q};
  }

  // One split of the keys of a bunch of heads, from h on: m, l and the unnormalised output of every
  // row, into `out` and what lies `splits` partials further on for each head.
  void stream(int64_t b, int64_t h, int64_t split, const Own& own, S* out) const {
    const Sequence<int64_t> sequence = f.sequence(b);
    const int64_t queries = rows_of(sequence), each = keys_each(visible(sequence));
    const int64_t first = sequence.begin(0) + split * each;
    const int64_t end = smaller(sequence.seq_k, first + each);
    if (first >= end || queries == 0) return;
    const int64_t here = smaller(bunch, heads - h);
    for (int64_t c = 0; c < here; ++c) {
      S* const m = out + c * splits * partial;
      memset(m + rows, 0, rows * (dv + 1) * sizeof(S));
      for (int64_t r = 0; r < queries; ++r) {
        m[r] = -infinity<S>;
        const Row row = row_of(sequence, h + c, r);
        const Source<T> from = source<T>(f.q, b, row.h, sequence.query_row(row.i));
        S* const q = own.q + (c * rows + r) * d;
        load_row(from.data, from.column, d, q, d);
        into_pairs(q, d);
      }
    }
    for (int64_t j0 = first; j0 < end; j0 += block) {
      const int64_t past = smaller(j0 + block, end);
      if (f.block_table) {
        const T **k = own.at, **v = own.at + block + ahead;
        find_rows(f.k, b, h, j0, past, k);
        find_rows(f.v, b, h, j0, past, v);
        attend({b, h, here, j0, past, sequence}, own, InPages{k, 0, f.k.stride[1]},
               InPages{v, 0, f.v.stride[1]}, out);
      } else {
        const int64_t row = sequence.key_row(j0);
        attend({b, h, here, j0, past, sequence}, own,
               InStep{f.k.at<const T>(b, h, row), f.k.stride[2], f.k.stride[1]},
               InStep{f.v.at<const T>(b, h, row), f.v.stride[2], f.v.stride[1]}, out);
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

  // Keys [begin, end) of some heads of a sequence.
  struct Block {
    int64_t b, h, heads, begin, end;
    const Sequence<int64_t>& sequence;
  };

  // Those that row r sees; none where a dense mask hides all of them, from every head.
  Span seen_by(const Block& at, int64_t r) const {
    const int64_t i = row_of(at.sequence, at.h, r).i;
    const Span keys{larger(at.begin, at.sequence.begin(i)), smaller(at.sequence.end(i), at.end)};
    const int64_t n = keys.end - keys.begin;
    for (int64_t c = 0; c < at.heads; ++c)
      if (n <= 0 || scores.mask.shows(at.b, row_of(at.sequence, at.h + c, r).h, i, keys.begin, n))
        return keys;
    return {0, 0};
  }

  // The rows of a head that see the same keys of a block go together.
  template <class Keys>
  void attend(const Block& block, const Own& own, const Keys& k, const Keys& v, S* out) const {
    const int64_t queries = rows_of(block.sequence);
    for (int64_t r = 0; r < queries;) {
      const Span keys = seen_by(block, r);
      int alike = 1;
      while (alike < together && r + alike < queries && seen_by(block, r + alike) == keys) ++alike;
      const int taken = alike >= together ? together : alike >= 2 ? 2 : 1;
      if (keys.begin < keys.end) {
        const Keys from_k = k.from(keys.begin - block.begin);
        const Keys from_v = v.from(keys.begin - block.begin);
        if (taken == together) {
          attend_rows<together>(block, r, keys, own, from_k, from_v, out);
        } else if (taken == 2) {
          attend_rows<2>(block, r, keys, own, from_k, from_v, out);
        } else {
          attend_rows<1>(block, r, keys, own, from_k, from_v, out);
        }
      }
      r += taken;
    }
  }

  // R rows of each head, from r on.
  template <int R, class Keys>
  void attend_rows(const Block& at, int64_t r, Span keys, const Own& own, const Keys& k,
                   const Keys& v, S* out) const {
    const int64_t n = keys.end - keys.begin;
    for (int64_t j = 0; j < n; j += w)
      for (int64_t c = 0; c < at.heads; ++c)
        multiply_keys<R>(own.q + (c * rows + r) * d, k.beside(c).from(j), smaller(w, n - j),
                         own.s + c * R * block + j);
    for (int64_t c = 0; c < at.heads; ++c) {
      const Keys rows_of_v = v.beside(c);
      for (int64_t j = 0; j < smaller(ahead, n); ++j) prefetch_row(rows_of_v[j], dv);
      S* const m = out + c * splits * partial + r;
      for (int x = 0; x < R; ++x)
        weigh(at, c, r + x, keys, own.s + (c * R + x) * block, own, m[x], m[rows + x],
              out + c * splits * partial + 2 * rows + (r + x) * dv);
    }
    for (int64_t j = 0; j < n; j += addends)
      for (int64_t c = 0; c < at.heads; ++c)
        add_values<R>(own.s + c * R * block + j, v.beside(c).from(j), smaller(addends, n - j),
                      out + c * splits * partial + 2 * rows + r * dv);
  }

  // The scores of a row become probabilities, its maximum and sum take them in.
  void weigh(const Block& at, int64_t c, int64_t r, Span keys, S* s, const Own& own, S& m, S& l,
             S* o) const {
    const auto [h, i] = row_of(at.sequence, at.h + c, r);
    const int64_t n = keys.end - keys.begin, wide = round_up(n, 2 * w);
    if (scores.rewrite) scores.prepare(s, at.sequence, at.b, h, i, keys.begin, n, own.beside);
    scores.mask.apply(s, at.b, h, i, keys.begin, n);
    const S origin = raise_maximum<Fma<S>>(scores, s, n, m, l, o, dv);
    const Rows<S> p{s, block, block};
    if (scores.dropout) {
      const int64_t before = keys.begin % 4;  // keys that share a counter with the first one
      scores.keep(at.b, h, i, keys.begin - before, before + n, own.keep);
      l += probabilities<Fma<S>, true>(s, n, wide, scores.factor, origin, p, 0, own.keep + before);
    } else {
      l += probabilities<Fma<S>, false>(s, n, wide, scores.factor, origin, p, 0, nullptr);
    }
  }

  // s[r][j] = q_r · k_j for up to a vector's width of keys.
  template <int R, class Keys>
  FUSEDATTN_MEMBER void multiply_keys(const S* q, const Keys& k, int64_t n, S* s) const {
    constexpr int K = held / R < w ? held / R : w;
    vec<S> lanes[R][w];
    for (int64_t c = 0; c < w; c += K) {
      const T* key[K];
#pragma GCC unroll 8
      for (int a = 0; a < K; ++a) {
        const int64_t j = smaller(c + a, n - 1);
        key[a] = k[j];
        prefetch_row(k[j + ahead], d);
      }
      vec<S> sum[R][K] = {};
      const auto add = [&](int64_t i, const vec<S>* x) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const vec<S> y = rounded(load(q + r * d + i));
#pragma GCC unroll 8
          for (int a = 0; a < K; ++a) sum[r][a] += y * x[a];
        }
      };
      int64_t i = 0;
      for (; i + 2 * w <= d; i += 2 * w) {
        vec<S> x[K], y[K];
#pragma GCC unroll 8
        for (int a = 0; a < K; ++a) load_pair<S>(key[a] + i, x[a], y[a]);
        add(i, x);
        add(i + w, y);
      }
      if (i < d) {
        vec<S> x[K];
#pragma GCC unroll 8
        for (int a = 0; a < K; ++a) x[a] = load_as(key[a] + i);
        add(i, x);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int a = 0; a < K; ++a) lanes[r][c + a] = sum[r][a];
    }
    for (int r = 0; r < R; ++r) store(s + r * block, sums_of_lanes<S>(lanes[r]));
  }

  // o_r += Σ p_rj v_j over a few keys, so that no chain of additions is long.
  template <int R, class Values>
  FUSEDATTN_MEMBER void add_values(const S* p, const Values& v, int64_t n, S* o) const {
    constexpr int N = held / R;
    int64_t i = 0;
    for (; i + N * w <= dv; i += N * w) add_columns<R, N>(p, v, i, n, o + i);
    for (; i + 2 * w <= dv; i += 2 * w) add_columns<R, 2>(p, v, i, n, o + i);
    if (i < dv) add_columns<R, 1>(p, v, i, n, o + i);
  }

  // Columns i … i + N · w of them.
  template <int R, int N, class Values>
  FUSEDATTN_MEMBER void add_columns(const S* p, const Values& v, int64_t i, int64_t n, S* o) const {
    vec<S> sum[R][N] = {};
    for (int64_t j = 0; j < n; ++j) {
      const T* row = v[j] + i;
      prefetch_row(v[j + ahead] + i, N * w);
      vec<S> x[N];
      if constexpr (N == 1) x[0] = load_as(row);
#pragma GCC unroll 4
      for (int c = 0; c + 1 < N; c += 2) load_pair<S>(row + c * w, x[c], x[c + 1]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vec<S> weight = splat(p[r * block + j]);
#pragma GCC unroll 8
        for (int c = 0; c < N; ++c) sum[r][c] += weight * x[c];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) store(o + r * dv + c * w, load(o + r * dv + c * w) + sum[r][c]);
  }

  // Bring the splits of one row to their common maximum, add them up and write the row.
  void combine(int64_t pair, int64_t r, S* partials) const {
    const int64_t b = pair / heads;
    const Sequence<int64_t> sequence = f.sequence(b);
    if (r >= rows_of(sequence)) return;
    const int64_t n = visible(sequence), each = keys_each(n), used = (n + each - 1) / each;
    S m = -infinity<S>, l = 0;
    for (int64_t k = 0; k < used; ++k) {
      const S of_split = partials[k * partial + r];
      m = of_split > m ? of_split : m;
    }
    S* const total = partials + 2 * rows + r * dv;
    for (int64_t k = 0; k < used; ++k) {
      const S* split = partials + k * partial;
      const S of_split = split[r];
      const S factor = of_split == -infinity<S>
                           ? S(1)
                           : scores.template carried<Fma<S>::exp2_degree>(of_split, m);
      l += split[rows + r] * factor;
      const S* row = split + 2 * rows + r * dv;
      for (int64_t i = 0; i < dv; i += w) {
        const vec<S> x = load(row + i) * factor;
        store(total + i, k == 0 ? x : load(total + i) + x);
      }
    }
    out_of_pairs(total, dv);
    const Row row = row_of(sequence, pair % heads, r);
    write_row<T>(scores, b, row.h, sequence.query_row(row.i), m, l, total);
  }
};

}  // namespace fusedattn::FUSEDATTN_ISA
