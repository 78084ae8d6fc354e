// Attention's forward pass on packed operands, any engine.
//
// K and V of a (batch, key head) are packed once, block by block, and read by all its queries and,
// with grouped queries, by all heads of the group. A task takes some queries through the blocks of
// keys that they see with a running maximum m and sum l:
//
//     s = q kᵀ              m' = max(m, max s)        p = exp(s − m')
//     l = l·exp(m − m') + Σ p        o = o·exp(m − m') + p v
//     out = o / l           lse = m + log l
//
// (Milakov and Gimelshein 2018), with exponentials to base 2 where the scores are in log2 units.
#pragma once

#include "attention_decode.h"
#include "attention_strip.h"

namespace fusedattn::FUSEDATTN_ISA {

// K and V of one (batch, key head), packed: Kᵀ as panels over the keys, V as panels over Dv.
template <class E>
struct PackedKeys {
  typedef unit_of<E> Unit;
  static constexpr int64_t block = ForwardBlocks<E>::keys;
  const TensorView &keys, &values;  // either absent: it has no units
  int64_t depth, columns_v, k_units, v_units, blocks;

  PackedKeys(const AttentionForward& p, const Lengths& lengths)
      : PackedKeys(p, lengths, p.k, p.v) {}
  PackedKeys(const AttentionForward& p, const Lengths& lengths, const TensorView& keys,
             const TensorView& values)
      : keys(keys),
        values(values),
        depth(panel_depth<E>(p.head_dim())),
        columns_v(panel_columns<E>(p.head_dim_v())),
        k_units(keys ? depth * block : 0),
        v_units(values ? block / E::per_unit * columns_v : 0),
        blocks((lengths.k + block - 1) / block) {}

  int64_t units() const { return E::planes * blocks * (k_units + v_units); }
  Panels<Unit> k(Unit* base, int64_t j) const {
    return {base + E::planes * j * (k_units + v_units), depth, k_units};
  }
  Panels<Unit> v(Unit* base, int64_t j) const {
    return {base + E::planes * (j * (k_units + v_units) + k_units), block / E::per_unit, v_units};
  }

  template <class T>
  bool pack(const AttentionForward& p, int64_t b, int64_t h, int64_t j, Unit* base,
            const ForwardScratch<E>& t) const {
    const Sequence<int64_t> sequence = p.sequence(b);
    const int64_t rows = smaller(sequence.seq_k - j * block, block);
    if (rows <= 0 || (j + 1) * block <= sequence.begin(0)) return true;
    const auto from = [&](const TensorView& x) {
      return p.block_table ? gathered<T>(p, x, b, h, j * block, rows, static_cast<T*>(t.pages))
                           : source<T>(x, b, h, sequence.key_row(j * block));
    };
    bool good = true;
    if (keys)
      good &= pack_panels_transposed<E>(from(keys), rows, p.head_dim(), round_up(rows, E::panel),
                                        k(base, j), t.packing);
    if (values)
      good &= pack_panels<E>(from(values), rows, p.head_dim_v(),
                             round_up(rows, 2 * width<stat_of<E>>), v(base, j));
    return good;
  }

  // Rows of pages, brought together.
  template <class T>
  static Source<T> gathered(const AttentionForward& p, const TensorView& x, int64_t b, int64_t h,
                            int64_t first, int64_t rows, T* to) {
    const int64_t n = x.shape[3];
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = p.paged_row<T>(x, b, h, first + r);
      for (int64_t c = 0; c < n; ++c) to[r * n + c] = row[c * x.stride[3]];
    }
    return {to, n, 1};
  }
};

// Queries [i0, i0 + rows) of head h of batch entry b, in strips of rows, over blocks of keys.
template <class E, class T>
class ForwardTask {
  typedef stat_of<E> S;
  typedef ForwardBlocks<E> Blocks;
  const Scores<S>& scores;
  const AttentionForward& f;
  const PackedKeys<E>& keys;
  unit_of<E>* packed;
  const ForwardScratch<E>& t;
  const Sequence<int64_t> sequence;
  const int64_t b, h, i0, rows, depth, columns_v;
  Strips<E> strips;

 public:
  ForwardTask(const Scores<S>& scores, const PackedKeys<E>& keys, unit_of<E>* packed, int64_t b,
              int64_t h, int64_t i0, int64_t rows, const ForwardScratch<E>& t)
      : scores(scores),
        f(scores.p),
        keys(keys),
        packed(packed),
        t(t),
        sequence(f.sequence(b)),
        b(b),
        h(h),
        i0(i0),
        rows(rows),
        depth(round_up(f.head_dim(), E::depth_step)),
        columns_v(round_up(f.head_dim_v(), width<S>)),
        strips(scores.mask, sequence, b, h, i0, rows) {}

  // False where the engine cannot take the numbers.
  bool run() {
    const int64_t padded = round_up(rows, E::row_step);
    if (!pack_rows<E>(source<T>(f.q, b, h, sequence.query_row(i0)), rows, f.head_dim(), padded,
                      t.q))
      return false;
    for (int64_t i = 0; i < rows; ++i) {
      t.m[i] = -infinity<S>;
      t.l[i] = 0;
    }
    if constexpr (E::overlaps) {
      overlapped();
    } else {
      for (Strip<E> strip = strips.first(); strip.rows > 0; strip = strips.next(strip)) {
        multiply_scores(strip, [](auto&&... x) { E::multiply(x...); });
        SoftmaxWork<E> softmax(scores, t, strip, sequence, b, h, i0);
        while (softmax.step()) {
        }
        multiply_values(strip, [](auto&&... x) { E::multiply(x...); });
      }
    }
    for (int64_t i = 0; i < rows; ++i)
      write_row<T>(scores, b, h, sequence.query_row(i0 + i), t.m[i], t.l[i], t.o + i * t.ld_o);
    return true;
  }

 private:
  // The softmax of a strip runs in the shadow of the scores of the next and the values of the last.
  void overlapped() {
    Strip<E> strip = strips.first(), last{};
    if (strip.rows > 0) multiply_scores(strip, [](auto&&... x) { E::multiply(x...); });
    while (strip.rows > 0) {
      const Strip<E> following = strips.next(strip);
      // Rows whose sums may shrink must not be summed at the same time.
      if (last.rows > 0 && last.row == strip.row) {
        multiply_values(last, [](auto&&... x) { E::multiply(x...); });
        last.rows = 0;
      }
      SoftmaxWork<E> softmax(scores, t, strip, sequence, b, h, i0);
      Pace<SoftmaxWork<E>> pace{softmax, softmax.steps(), 0};
      const auto count = [&](int64_t m, int64_t columns, int64_t k, auto&&...) {
        pace.ticks += E::ticks(m, columns, k);
      };
      const auto beside = [&](auto&&... x) { E::multiply_beside(x..., pace); };
      if (following.rows > 0) multiply_scores(following, count);
      if (last.rows > 0) multiply_values(last, count);
      if (following.rows > 0) multiply_scores(following, beside);
      if (last.rows > 0) multiply_values(last, beside);
      while (softmax.step()) {
      }
      last = strip;
      strip = following;
    }
    if (last.rows > 0) multiply_values(last, [](auto&&... x) { E::multiply(x...); });
  }

  template <class Multiply>
  void multiply_scores(const Strip<E>& x, Multiply multiply) const {
    multiply(round_up(x.rows, E::row_step), x.wide, depth, t.q.from(x.row),
             keys.k(packed, x.key / keys.block), t.scores(x), keys.block, false);
  }

  template <class Multiply>
  void multiply_values(const Strip<E>& x, Multiply multiply) const {
    multiply(round_up(x.rows, E::row_step), columns_v, x.wide, t.probabilities(x),
             keys.v(packed, x.key / keys.block), t.o + x.row * t.ld_o, t.ld_o, !x.first);
  }
};

// The forward pass of the sequences that `Decode` does not take.
template <class E, class T>
struct ForwardPass {
  typedef AttentionForward Params;
  typedef PackedKeys<E> Keys;
  typedef ForwardScratch<E> Scratch;
  typedef ForwardTask<E, T> Task;
  static bool takes(const Params& f, int64_t queries) { return !Decode<T>::takes(f, queries); }
};

// A pass over the sequences that it takes, of which `lengths` are: keys are packed, and tasks have
// some queries of one head each.
template <class E, class T, template <class, class> class Pass>
static bool attention_tiles(const typename Pass<E, T>::Params& f, const Lengths& lengths) {
  typedef typename Pass<E, T>::Scratch Scratch;
  typedef unit_of<E> Unit;
  typedef ForwardBlocks<E> Blocks;
  Scores<stat_of<E>> scores(f);
  const typename Pass<E, T>::Keys keys(f, lengths);
  const int64_t pairs = f.sequences() * f.heads_kv(), group = f.group();
  const int threads = threads_for(f, lengths);
  // Rows of a task: many, but not so many that threads stay without one.
  const int64_t share = f.heads() * lengths.queries / (4 * threads);
  const int64_t queries = smaller(round_up(larger(share, 1), Blocks::strip), Blocks::queries);
  const int64_t blocks_q = (lengths.q + queries - 1) / queries;
  const int64_t pair_units = keys.units();
  const bool apart = pairs_apart(f, lengths, threads, pair_units * int64_t(sizeof(Unit)));

  Arena count;
  scores.mask.take(count);
  if (!apart) count.take<Unit>(pair_units);
  const size_t shared = count.used();
  (void)Scratch(f, count);
  if (apart) count.take<Unit>(pair_units);
  const size_t own = count.used() - shared;
  const Workspace workspace(shared, own, threads);
  Arena common = workspace.shared();
  scores.mask.take(common);
  Unit* const packed_by_all = apart ? nullptr : common.take<Unit>(pair_units);
  bool good = true;

#pragma omp parallel num_threads(threads) reduction(&& : good)
  {
    [[maybe_unused]] const typename E::Scope scope;
    Arena arena = workspace.own(omp_get_thread_num());
    const Scratch scratch(f, arena);
    Unit* const packed = apart ? arena.take<Unit>(pair_units) : packed_by_all;
    const auto mine = [&](int64_t pair) {
      return Pass<E, T>::takes(f, f.sequence(pair / f.heads_kv()).seq_q);
    };
    const auto pack = [&](int64_t pair, int64_t block) {
      return keys.template pack<T>(f, pair / f.heads_kv(), pair % f.heads_kv(), block, packed,
                                   scratch);
    };
    // Under a causal mask the last queries have most to do: they start first.
    const auto attend = [&](int64_t pair, int64_t task) {
      const int64_t head = pair % f.heads_kv() * group + task / blocks_q;
      const int64_t i0 = (blocks_q - 1 - task % blocks_q) * queries, b = pair / f.heads_kv();
      const int64_t rows = smaller(queries, f.sequence(b).seq_q - i0);
      if (rows <= 0) return true;
      return typename Pass<E, T>::Task(scores, keys, packed, b, head, i0, rows, scratch).run();
    };
#pragma omp for schedule(static)
    for (int64_t i = 0; i < scores.mask.tasks(); ++i) scores.mask.run(i);
    if (apart) {
#pragma omp for schedule(dynamic)
      for (int64_t pair = 0; pair < pairs; ++pair) {
        if (!mine(pair)) continue;
        for (int64_t block = 0; block < keys.blocks; ++block) good &= pack(pair, block);
        for (int64_t task = 0; task < group * blocks_q; ++task) good &= attend(pair, task);
      }
    } else {
      for (int64_t pair = 0; pair < pairs; ++pair) {
        if (!mine(pair)) continue;
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < keys.blocks; ++block) good &= pack(pair, block);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < group * blocks_q; ++task) good &= attend(pair, task);
      }
    }
  }
  return good;
}

template <class E, class T>
static bool attention_forward(const AttentionForward& f) {
  const auto few = [&](int64_t queries) { return Decode<T>::takes(f, queries); };
  const Lengths short_ones(f, few), others(f, [&](int64_t queries) { return !few(queries); });
  if (short_ones.q > 0) Decode<T>(f, short_ones).run(threads_for(f, short_ones));
  fill_rest<T>(f, f.out, f.lse, -infinity<float>);
  return others.q == 0 || attention_tiles<E, T, ForwardPass>(f, others);
}

}  // namespace fusedattn::FUSEDATTN_ISA
