// Attention's forward mode: the forward pass with the derivatives of its sums along tangents.
//
// To what a task of the forward keeps for each query, m, l and o, come two sums:
//
//     t_s = scale · (t_q kᵀ + q t_kᵀ), times the slope of a softcap, + t_bias
//     d = d·exp(m − m') + Σ p t_s        t_o = t_o·exp(m − m') + (p ∘ t_s) v + p t_v
//     t_lse = d / l                      t_out = (t_o − o · t_lse) / l
//
// Dropout changes p in the sums of o and t_o. Products with an absent tangent are left out.
#pragma once

#include "attention_forward.h"

namespace fusedattn::FUSEDATTN_ISA {

// K and V of one (batch, key head), and their tangents, packed.
template <class E>
struct JvpKeys {
  typedef unit_of<E> Unit;
  const AttentionJvp& f;
  const PackedKeys<E> keys, moved;
  const int64_t blocks;

  JvpKeys(const AttentionJvp& f, const Lengths& lengths)
      : f(f), keys(f, lengths), moved(f, lengths, f.t_k, f.t_v), blocks(keys.blocks) {}

  int64_t units() const { return keys.units() + moved.units(); }
  Unit* behind(Unit* packed) const { return packed + keys.units(); }

  template <class T>
  bool pack(const AttentionForward& p, int64_t b, int64_t h, int64_t j, Unit* packed,
            const ForwardScratch<E>& scratch) const {
    return keys.template pack<T>(p, b, h, j, packed, scratch) &
           moved.template pack<T>(p, b, h, j, behind(packed), scratch);
  }
};

// A row of o is followed by its t_o and by a vector, whose lanes add up to d: all three shrink
// where the maximum rises.
template <class E>
struct JvpScratch : ForwardScratch<E> {
  typedef stat_of<E> S;
  typedef unit_of<E> Unit;
  typedef ForwardScratch<E> Base;
  Rows<Unit> t_q{};
  S *t_s, *slope = nullptr;  // of a strip; slope where there is a softcap
  Rows<Unit> w;              // p ∘ t_s, in the place of t_s where they are stored alike
  int64_t t_o, d;            // where they begin in a row of o

  JvpScratch(const AttentionJvp& f, Arena& arena) : Base(f, arena, 2, width<S>) {
    t_o = panel_columns<E>(f.head_dim_v());
    d = 2 * t_o;
    if (f.t_q)
      t_q = {arena.take<Unit>(E::planes * Base::rows * this->q.ld), this->q.ld, this->q.plane};
    constexpr int64_t strip = Base::Blocks::strip, units = strip * Base::units;
    t_s = arena.take<S>(strip * Base::keys);
    w = {Base::in_place ? (Unit*)t_s : arena.take<Unit>(E::planes * units), Base::units, units};
    if (f.options.softcap > 0) slope = arena.take<S>(Base::keys);
  }
};

// `probabilities` of a row and, in `w`, each times factor_t · t_s; these are added to d as well.
template <class E, bool dropped>
FUSEDATTN_INLINE stat_of<E> moved_probabilities(const stat_of<E>* s, const stat_of<E>* t_s,
                                                int64_t n, int64_t wide, stat_of<E> factor,
                                                stat_of<E> shift, stat_of<E> factor_t,
                                                Rows<unit_of<E>> p, Rows<unit_of<E>> w, int64_t i,
                                                const uint8_t* keep, stat_of<E>* d) {
  typedef stat_of<E> S;
  constexpr int v = width<S>;
  const vec<S> zero{};
  vec<S> sum{}, moved = load(d);
  int64_t j = 0;
  for (; j < n; j += 2 * v) {
    vec<S> x[2], y[2];
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      x[c] = exp2<E::exp2_degree>(load(s + j + c * v) * factor - shift);
      y[c] = load(t_s + j + c * v) * factor_t * x[c];
    }
    if (j + 2 * v > n)
      for (int c = 0; c < 2; ++c) {
        x[c] = select_below(int(n - j - c * v), x[c], zero);
        y[c] = select_below(int(n - j - c * v), y[c], zero);
      }
    sum += x[0] + x[1];
    moved += y[0] + y[1];
    if constexpr (dropped)
      for (int c = 0; c < 2; ++c) {
        x[c] = select_bytes<S>(keep + j + c * v, x[c], zero);
        y[c] = select_bytes<S>(keep + j + c * v, y[c], zero);
      }
    E::put_along(p, i, j, x[0], x[1]);
    E::put_along(w, i, j, y[0], y[1]);
  }
  for (; j < wide; j += 2 * v) {
    E::put_along(p, i, j, zero, zero);
    E::put_along(w, i, j, zero, zero);
  }
  store(d, moved);
  return reduce_add(sum);
}

// Queries [i0, i0 + rows) of head h of batch entry b, as `ForwardTask`.
template <class E, class T>
class JvpTask {
  typedef stat_of<E> S;
  const Scores<S>& scores;
  const AttentionJvp& f;
  const JvpKeys<E>& keys;
  unit_of<E>* packed;
  const JvpScratch<E>& t;
  const Sequence<int64_t> sequence;
  const int64_t b, h, i0, rows, depth, columns_v;

 public:
  JvpTask(const Scores<S>& scores, const JvpKeys<E>& keys, unit_of<E>* packed, int64_t b, int64_t h,
          int64_t i0, int64_t rows, const JvpScratch<E>& t)
      : scores(scores),
        f(keys.f),
        keys(keys),
        packed(packed),
        t(t),
        sequence(f.sequence(b)),
        b(b),
        h(h),
        i0(i0),
        rows(rows),
        depth(round_up(f.head_dim(), E::depth_step)),
        columns_v(round_up(f.head_dim_v(), width<S>)) {}

  // False where the engine cannot take the numbers.
  bool run() {
    const int64_t padded = round_up(rows, E::row_step), first = sequence.query_row(i0);
    if (!pack_rows<E>(source<T>(f.q, b, h, first), rows, f.head_dim(), padded, t.q)) return false;
    if (f.t_q && !pack_rows<E>(source<T>(f.t_q, b, h, first), rows, f.head_dim(), padded, t.t_q))
      return false;
    for (int64_t i = 0; i < rows; ++i) {
      t.m[i] = -infinity<S>;
      t.l[i] = 0;
      // What no product writes: d, and t_o without tangents.
      memset(t.o + i * t.ld_o + t.t_o, 0, (t.ld_o - t.t_o) * sizeof(S));
    }
    Strips<E> strips(scores.mask, sequence, b, h, i0, rows);
    for (Strip<E> x = strips.first(); x.rows > 0; x = strips.next(x)) {
      multiply_scores(x);
      for (int64_t row = 0; row < x.rows; ++row) soften(x, row);
      multiply_values(x);
    }
    for (int64_t i = 0; i < rows; ++i) write(i);
    return true;
  }

 private:
  void multiply_scores(const Strip<E>& x) const {
    const int64_t m = round_up(x.rows, E::row_step), j = x.key / keys.keys.block;
    const auto multiply = [&](Rows<unit_of<E>> a, const PackedKeys<E>& k, unit_of<E>* base, S* to,
                              bool accumulate) {
      E::multiply(m, x.wide, depth, a.from(x.row), k.k(base, j), to, k.block, accumulate);
    };
    multiply(t.q, keys.keys, packed, t.scores(x), false);
    if (f.t_q) multiply(t.t_q, keys.keys, packed, t.t_s, false);
    if (f.t_k) multiply(t.q, keys.moved, keys.behind(packed), t.t_s, bool(f.t_q));
  }

  void multiply_values(const Strip<E>& x) const {
    const int64_t m = round_up(x.rows, E::row_step), j = x.key / keys.keys.block;
    const auto multiply = [&](Rows<unit_of<E>> a, const PackedKeys<E>& k, unit_of<E>* base,
                              int64_t to, bool accumulate) {
      E::multiply(m, columns_v, x.wide, a, k.v(base, j), t.o + x.row * t.ld_o + to, t.ld_o,
                  accumulate);
    };
    const bool more = !x.first;
    multiply(t.probabilities(x), keys.keys, packed, 0, more);
    if (f.scores_move()) multiply(t.w, keys.keys, packed, t.t_o, more);
    if (f.t_v)
      multiply(t.probabilities(x), keys.moved, keys.behind(packed), t.t_o, more || f.scores_move());
  }

  // The softmax of a row of a strip, and what moves with it.
  void soften(const Strip<E>& x, int64_t row) const {
    constexpr int64_t block = ForwardBlocks<E>::keys;
    const int64_t local = x.row + row, i = i0 + local;
    S *const s = t.scores(x) + row * block, *const t_s = t.t_s + row * block;
    S* const o = t.o + local * t.ld_o;
    const int64_t seen = score_row<E>(scores, x, sequence, b, h, i, s, t.row, t.slope);
    const S factor_t = move_scores(t_s, i, x.key, seen);
    const S origin =
        raise_maximum<E>(scores, s, seen, t.m[local], t.l[local], o, x.first ? 0 : t.ld_o);
    alignas(64) uint8_t keep[block];
    if (scores.dropout) scores.keep(b, h, i, x.key, seen, keep);
    const Rows<unit_of<E>> p = t.probabilities(x);
    const auto take = [&]<bool dropped>() {
      return f.scores_move()
                 ? moved_probabilities<E, dropped>(s, t_s, seen, x.wide, scores.factor, origin,
                                                   factor_t, p, t.w, row, keep, o + t.d)
                 : probabilities<E, dropped>(s, seen, x.wide, scores.factor, origin, p, row, keep);
    };
    t.l[local] +=
        scores.dropout ? take.template operator()<true>() : take.template operator()<false>();
  }

  // Raw derivatives of n scores of query i, from key j0 on, become those that times what is
  // returned are the derivatives.
  S move_scores(S* t_s, int64_t i, int64_t j0, int64_t n) const {
    const S scale = S(f.options.scale);
    if (t.slope == nullptr && !f.t_bias) return scale;
    const bool product = f.t_q || f.t_k;
    if (f.t_bias) scores.load_pairs(f.t_bias, b, h, i, j0, n, t.row);
    for (int64_t j = 0; j < n; j += width<S>) {
      vec<S> x = product ? load(t_s + j) * scale : vec<S>{};
      if (t.slope != nullptr) x *= load(t.slope + j);
      if (f.t_bias) x += load(t.row + j);
      store(t_s + j, x);
    }
    return 1;
  }

  void write(int64_t local) const {
    const int64_t i = sequence.query_row(i0 + local), dv = f.head_dim_v();
    S *const o = t.o + local * t.ld_o, *const t_o = o + t.t_o;
    const S weight = write_row<T>(scores, b, h, i, t.m[local], t.l[local], o);
    const bool nothing = t.l[local] == 0;  // and o was never written
    const S t_lse = nothing ? S(0) : reduce_add(load(o + t.d)) * weight;
    for (int64_t c = 0; c < dv; c += width<S>)
      store(t_o + c, nothing ? vec<S>{} : load(t_o + c) - load(o + c) * t_lse);
    store_row(f.t_out.at<T>(b, h, i), f.t_out.stride[3], dv, t_o,
              weight * S(scores.dropout.factor));
    *f.t_lse.at<S>(b, h, i) = t_lse;
  }
};

template <class E, class T>
struct JvpPass {
  typedef AttentionJvp Params;
  typedef JvpKeys<E> Keys;
  typedef JvpScratch<E> Scratch;
  typedef JvpTask<E, T> Task;
  static bool takes(const Params&, int64_t) { return true; }
};

template <class E, class T>
static bool attention_jvp(const AttentionJvp& f) {
  fill_rest<T>(f, f.out, f.lse, -infinity<float>);
  fill_rest<T>(f, f.t_out, f.t_lse, 0);
  return attention_tiles<E, T, JvpPass>(f, Lengths(f, [](int64_t) { return true; }));
}

}  // namespace fusedattn::FUSEDATTN_ISA
