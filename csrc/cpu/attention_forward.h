// Attention's forward pass on packed operands, any engine.
//
// K and V of a (batch, head) are packed once, block by block, and read by all its queries and, with
// grouped queries, by all heads of the group. Each task takes `block_q` queries through the blocks
// of keys that they see with a running maximum m and sum l (in log2 units):
//
//     s = q kᵀ          m' = max(m, max s)        p = 2^(s − m')
//     l = l·2^(m − m') + Σ p        o = o·2^(m − m') + p v        out = o / l,  lse = ln 2·(m +
//     log2 l)
#pragma once

#include "attention_decode.h"

namespace fusedattn::FUSEDATTN_ISA {

template <class E>
struct ForwardBlocks {
  static constexpr int64_t queries = 96;
  static constexpr int64_t keys = 256;
  static constexpr int64_t strip = E::row_step == 1 ? queries : 32;  // rows between the products
};

// K and V of one (batch, key head), packed: Kᵀ as panels over the keys, V as panels over Dv.
template <class E>
struct PackedKeys {
  typedef unit_of<E> Unit;
  static constexpr int64_t block = ForwardBlocks<E>::keys;
  int64_t depth, columns_v, k_units, v_units, blocks;

  explicit PackedKeys(const AttentionForward& p)
      : depth(panel_depth<E>(p.head_dim())),
        columns_v(panel_columns<E>(p.head_dim_v())),
        k_units(depth * block),
        v_units(block / E::per_unit * columns_v),
        blocks((p.seq_k() + block - 1) / block) {}

  int64_t units() const { return E::planes * blocks * (k_units + v_units); }
  Panels<Unit> k(Unit* base, int64_t j) const {
    return {base + E::planes * j * (k_units + v_units), depth, k_units};
  }
  Panels<Unit> v(Unit* base, int64_t j) const {
    return {base + E::planes * (j * (k_units + v_units) + k_units), block / E::per_unit, v_units};
  }

  template <class T>
  bool pack(const AttentionForward& p, int64_t b, int64_t h, int64_t j, Unit* base,
            Unit* scratch) const {
    const int64_t first = j * block, rows = smaller(p.keys(b) - first, block);
    if (rows <= 0) return true;
    return pack_panels_transposed<E>(source<T>(p.k, b, h, first), rows, p.head_dim(),
                                     round_up(rows, E::panel), k(base, j), scratch) &
           pack_panels<E>(source<T>(p.v, b, h, first), rows, p.head_dim_v(),
                          round_up(rows, 2 * width<stat_of<E>>), v(base, j));
  }
};

// A thread's buffers.
template <class E>
struct ForwardScratch {
  typedef stat_of<E> S;
  typedef unit_of<E> Unit;
  static constexpr int64_t rows = ForwardBlocks<E>::queries, keys = ForwardBlocks<E>::keys;
  static constexpr bool in_place = sizeof(Unit) == sizeof(S) && E::per_unit == 1;
  Rows<Unit> q, p;
  S *s, *o, *m, *l, *row;
  Unit* strip;
  int64_t ld_o;

  ForwardScratch(const AttentionForward& f, Arena& arena) {
    const int64_t units = row_units<E>(f.head_dim());
    ld_o = panel_columns<E>(f.head_dim_v());
    q = {arena.take<Unit>(E::planes * rows * units), units, rows * units};
    s = arena.take<S>(rows * keys);
    // Probabilities take the scores' place where they are stored alike.
    Unit* separate = in_place ? nullptr : arena.take<Unit>(E::planes * rows * keys / E::per_unit);
    p = {in_place ? (Unit*)s : separate, keys / E::per_unit, rows * keys / E::per_unit};
    o = arena.take<S>(rows * ld_o);
    m = arena.take<S>(rows);
    l = arena.take<S>(rows);
    row = arena.take<S>(keys);
    strip = arena.take<Unit>(E::planes * units * (vector_bytes / sizeof(Unit)));
  }
};

// Queries [i0, i0 + rows) of head h of batch entry b; false where the engine cannot take them.
template <class E, class T>
static bool forward_block(const Scores<stat_of<E>>& scores, const PackedKeys<E>& keys,
                          unit_of<E>* packed, int64_t b, int64_t h, int64_t i0, int64_t rows,
                          const ForwardScratch<E>& t) {
  typedef stat_of<E> S;
  typedef ForwardBlocks<E> Blocks;
  constexpr int w = width<S>;
  const AttentionForward& f = scores.p;
  const int64_t n = f.keys(b), end = f.keys_seen(i0 + rows - 1, n);
  const int64_t padded = round_up(rows, E::row_step), dv = f.head_dim_v();
  const int64_t depth = round_up(f.head_dim(), E::depth_step);
  if (!pack_rows<E>(source<T>(f.q, b, h, i0), rows, f.head_dim(), padded, t.q)) return false;
  for (int64_t i = 0; i < rows; ++i) {
    t.m[i] = -infinity<S>;
    t.l[i] = 0;
  }
  for (int64_t j0 = 0, block = 0; j0 < end; j0 += keys.block, ++block) {
    const int64_t columns = smaller(keys.block, end - j0), wide = round_up(columns, 2 * w);
    E::multiply(padded, wide, depth, t.q, keys.k(packed, block), t.s, keys.block, false);
    for (int64_t r = 0; r < rows; r += Blocks::strip) {
      const int64_t strip_end = smaller(r + Blocks::strip, rows);
      for (int64_t i = r; i < strip_end; ++i) {
        S* s = t.s + i * keys.block;
        const int64_t seen = larger(smaller(f.keys_seen(i0 + i, n) - j0, columns), 0);
        if (scores.rewrite) scores.prepare(s, b, h, i0 + i, j0, seen, t.row);
        softmax_row<E>(scores, s, seen, wide, t.m[i], t.l[i], t.o + i * t.ld_o,
                       block > 0 ? t.ld_o : 0, t.p, i);
      }
      E::multiply(round_up(strip_end - r, E::row_step), round_up(dv, w), wide, t.p.from(r),
                  keys.v(packed, block), t.o + r * t.ld_o, t.ld_o, block > 0);
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    write_row<T>(scores, b, h, i0 + i, t.m[i], t.l[i], t.o + i * t.ld_o);
  return true;
}

template <class E, class T>
static bool attention_forward(const AttentionForward& f) {
  typedef unit_of<E> Unit;
  typedef ForwardBlocks<E> Blocks;
  const Scores<stat_of<E>> scores(f);
  const PackedKeys<E> keys(f);
  const int64_t pairs = f.batch() * f.heads_kv(), group = f.group();
  const int64_t blocks_q = (f.seq_q() + Blocks::queries - 1) / Blocks::queries;
  const int threads = threads_for(f);
  if (Decode<T>::takes(f)) {
    Decode<T>(f).run(threads);
    return true;
  }
  // As many heads at a time as fit the cache, but enough to keep all threads busy.
  const int64_t fitting = (int64_t{4} << 20) / (keys.units() * int64_t(sizeof(Unit)));
  const int64_t busy = (4 * threads + group * blocks_q - 1) / (group * blocks_q);
  const int64_t at_once = smaller(larger(larger(fitting, busy), 1), pairs);

  Arena count;
  count.take<Unit>(at_once * keys.units());
  const size_t shared = count.used();
  (void)ForwardScratch<E>(f, count);
  const size_t own = count.used() - shared;
  const Workspace workspace(shared + own * threads);
  Unit* const packed = reinterpret_cast<Unit*>(workspace.data());
  bool good = true;

#pragma omp parallel num_threads(threads) reduction(&& : good)
  {
    [[maybe_unused]] const typename E::Scope scope;
    Arena arena(workspace.data() + shared + own * omp_get_thread_num());
    const ForwardScratch<E> scratch(f, arena);
    for (int64_t first = 0; first < pairs; first += at_once) {
      const int64_t here = smaller(at_once, pairs - first);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < here * keys.blocks; ++task) {
        const int64_t pair = first + task / keys.blocks;
        good &=
            keys.template pack<T>(f, pair / f.heads_kv(), pair % f.heads_kv(), task % keys.blocks,
                                  packed + task / keys.blocks * keys.units(), scratch.strip);
      }
      // Under a causal mask the last queries have most to do: they start first.
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < here * group * blocks_q; ++task) {
        const int64_t block = blocks_q - 1 - task / (here * group);
        const int64_t local = task % (here * group) / group, pair = first + local;
        const int64_t head = pair % f.heads_kv() * group + task % group;
        const int64_t i0 = block * Blocks::queries;
        good &=
            forward_block<E, T>(scores, keys, packed + local * keys.units(), pair / f.heads_kv(),
                                head, i0, smaller(Blocks::queries, f.seq_q() - i0), scratch);
      }
    }
  }
  return good;
}

}  // namespace fusedattn::FUSEDATTN_ISA
