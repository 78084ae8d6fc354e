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

// The strips of queries [i0, i0 + rows) of head h of batch entry b, block of keys by block.
template <class E>
class Strips {
  typedef ForwardBlocks<E> Blocks;
  const MaskMap& mask;
  const Sequence<int64_t>& sequence;
  const int64_t b, h, i0, rows;
  uint64_t begun = 0;  // strips of rows, a bit each

 public:
  Strips(const MaskMap& mask, const Sequence<int64_t>& sequence, int64_t b, int64_t h, int64_t i0,
         int64_t rows)
      : mask(mask), sequence(sequence), b(b), h(h), i0(i0), rows(rows) {}

  Strip<E> first() {
    return next(
        {sequence.begin(i0) / Blocks::keys * Blocks::keys, -Blocks::strip, 0, 0, 0, 1, true});
  }

  // The next strip of this block of keys, else the first of the next block; only those that see a
  // key. Without rows where there is none.
  Strip<E> next(Strip<E> x) {
    const int64_t end = sequence.end(i0 + rows - 1);
    while (x.key < end) {
      x.row += Blocks::strip;
      if (x.row >= rows) {
        x.row = 0;
        x.key += Blocks::keys;
      }
      x.rows = smaller(Blocks::strip, rows - x.row);
      x.columns = smaller(Blocks::keys, sequence.end(i0 + x.row + x.rows - 1) - x.key);
      if (x.key >= end || x.key + Blocks::keys <= sequence.begin(i0 + x.row)) continue;
      x.columns = mask.cut(b, h, i0 + x.row, x.rows, x.key, x.columns);
      if (x.columns > 0) {
        const uint64_t strip = uint64_t{1} << x.row / Blocks::strip;
        x.first = !(begun & strip);
        begun |= strip;
        x.wide = round_up(x.columns, 2 * width<stat_of<E>>);
        x.buffer ^= 1;
        return x;
      }
    }
    return {};
  }
};

// Raw scores of query i in a strip become scores, of which the first so many are seen: what it
// returns. `slope` as in `prepare`.
template <class E>
static int64_t score_row(const Scores<stat_of<E>>& scores, const Strip<E>& x,
                         const Sequence<int64_t>& sequence, int64_t b, int64_t h, int64_t i,
                         stat_of<E>* s, stat_of<E>* row, stat_of<E>* slope = nullptr) {
  int64_t seen = larger(smaller(sequence.end(i) - x.key, x.columns), 0);
  seen = scores.mask.cut(b, h, i, 1, x.key, seen);
  if (scores.rewrite) scores.prepare(s, sequence, b, h, i, x.key, seen, row, slope);
  scores.mask.apply(s, b, h, i, x.key, seen);
  scores.hide(s, smaller(sequence.begin(i) - x.key, seen));
  return seen;
}

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

  // With room for so many rows of sums as wide as Dv, and further numbers, in a row of o.
  ForwardScratch(const AttentionForward& f, Arena& arena, int64_t sums = 1, int64_t further = 0) {
    const int64_t units_q = row_units<E>(f.head_dim());
    ld_o = sums * panel_columns<E>(f.head_dim_v()) + further;
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
      seen = score_row<E>(scores, x, sequence, b, h, i, s, t.row);
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
