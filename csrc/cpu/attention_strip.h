// A strip: a few rows of queries against one block of keys, between its two products.
#pragma once

#include "attention_softmax.h"

namespace fusedattn::FUSEDATTN_ISA {

// Each task takes up to `queries` rows through a block of keys before the next block: what it reads
// from beyond its own cache, it reads once for all of them.
template <class E>
struct ForwardBlocks {
  static constexpr int64_t strip = E::overlaps ? 64 : 192;
  static constexpr int64_t queries = E::overlaps ? 256 : 384;
  static constexpr int64_t keys = E::overlaps ? 256 : 128;
};

template <class E>
struct Strip {
  int64_t key, row;             // where it begins: in the keys, and in the task's queries
  int64_t rows, columns, wide;  // wide: columns rounded up to whole pairs of vectors
  int buffer;                   // which of two, where strips overlap
  bool first;                   // of its rows: nothing has been summed yet
};

// A thread's buffers for the forward pass.
template <class E>
struct ForwardScratch {
  typedef stat_of<E> S;
  typedef unit_of<E> Unit;
  typedef ForwardBlocks<E> Blocks;
  static constexpr int64_t rows = Blocks::queries, keys = Blocks::keys;
  static constexpr int64_t buffers = E::overlaps ? 2 : 1;
  // Probabilities take the scores' place where they are stored alike.
  static constexpr bool in_place = sizeof(Unit) == sizeof(S) && E::per_unit == 1;
  static constexpr int64_t units = keys / E::per_unit;  // of a row of probabilities
  Rows<Unit> q;
  S *s, *o, *m, *l, *row;
  Unit *p, *packing;
  void* pages = nullptr;  // K or V of a block, where a cache has pages
  int64_t ld_o;

  ForwardScratch(const AttentionForward& f, Arena& arena) {
    const int64_t units_q = row_units<E>(f.head_dim());
    ld_o = panel_columns<E>(f.head_dim_v());
    q = {arena.take<Unit>(E::planes * rows * units_q), units_q, rows * units_q};
    s = arena.take<S>(buffers * Blocks::strip * keys);
    p = in_place ? (Unit*)s : arena.take<Unit>(buffers * E::planes * Blocks::strip * units);
    o = arena.take<S>(rows * ld_o);
    m = arena.take<S>(rows);
    l = arena.take<S>(rows);
    row = arena.take<S>(keys);
    packing = arena.take<Unit>(E::planes * units_q * (vector_bytes / sizeof(Unit)));
    if (f.block_table) pages = arena.take<double>(keys * larger(f.head_dim(), f.head_dim_v()));
  }

  S* scores(const Strip<E>& x) const { return s + x.buffer % buffers * Blocks::strip * keys; }
  Rows<Unit> probabilities(const Strip<E>& x) const {
    return {p + x.buffer % buffers * E::planes * Blocks::strip * units, units,
            Blocks::strip * units};
  }
};

// The softmax of a strip in small steps, which other work may come between.
template <class E>
class SoftmaxWork {
  typedef stat_of<E> S;
  static constexpr int64_t span = 128;  // columns of a step
  const Scores<S>& scores;
  const ForwardScratch<E>& t;
  const Strip<E> x;
  const Sequence<int64_t>& sequence;
  const int64_t b, h, i0;
  int64_t row = 0, column = -1, seen = 0;
  S origin = 0;

 public:
  SoftmaxWork(const Scores<S>& scores, const ForwardScratch<E>& t, const Strip<E>& x,
              const Sequence<int64_t>& sequence, int64_t b, int64_t h, int64_t i0)
      : scores(scores), t(t), x(x), sequence(sequence), b(b), h(h), i0(i0) {}

  int64_t steps() const { return x.rows * (1 + (x.wide + span - 1) / span); }

  // Does one step; false when there was none left.
  bool step() {
    if (row == x.rows) return false;
    S* const s = t.scores(x) + row * ForwardBlocks<E>::keys;
    const int64_t local = x.row + row, i = i0 + local;
    if (column < 0) {
      seen = larger(smaller(sequence.end(i) - x.key, x.columns), 0);
      seen = scores.mask.cut(b, h, i, 1, x.key, seen);
      if (scores.rewrite) scores.prepare(s, sequence, b, h, i, x.key, seen, t.row);
      scores.mask.apply(s, b, h, i, x.key, seen);
      scores.hide(s, smaller(sequence.begin(i) - x.key, seen));
      origin = raise_maximum<E>(scores, s, seen, t.m[local], t.l[local], t.o + local * t.ld_o,
                                x.first ? 0 : t.ld_o);
      column = 0;
      return true;
    }
    Rows<unit_of<E>> p = t.probabilities(x);
    p.data += column / E::per_unit;
    const int64_t here = larger(smaller(seen - column, span), 0);
    const int64_t wide = smaller(x.wide - column, span);
    if (scores.dropout) {
      alignas(64) uint8_t keep[span];
      scores.keep(b, h, i, x.key + column, here, keep);
      t.l[local] +=
          probabilities<E, true>(s + column, here, wide, scores.factor, origin, p, row, keep);
    } else {
      t.l[local] +=
          probabilities<E, false>(s + column, here, wide, scores.factor, origin, p, row, nullptr);
    }
    column += span;
    if (column >= x.wide) {
      column = -1;
      ++row;
    }
    return true;
  }
};

// Spreads the steps of some work evenly over the ticks of other work.
template <class Work>
struct Pace {
  Work& work;
  int64_t steps, ticks;
  int64_t due = 0;

  FUSEDATTN_MEMBER void operator()() {
    for (due += steps; due >= ticks; due -= ticks) work.step();
  }
};

}  // namespace fusedattn::FUSEDATTN_ISA
