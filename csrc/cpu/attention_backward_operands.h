// What attention's backward pass multiplies: the rows of a (batch, key head) as its engine reads
// them.
#pragma once

#include "attention_tile.h"

namespace fusedattn::FUSEDATTN_ISA {

// Sizes of a tile; `strip` queries are scored at a time, so that their scores stay in L1.
template <class E>
struct BackwardBlocks {
  static constexpr int64_t queries = E::overlaps ? 64 : 96;
  static constexpr int64_t keys = E::overlaps ? 256 : 128;
  static constexpr int64_t strip = E::overlaps ? 32 : 96;
  static constexpr int64_t padding = 32;  // rows are padded to whole squares of a transpose
};

// The operands of one (batch, key head) and its group of query heads, packed block by block.
template <class E>
struct BackwardOperands {
  typedef stat_of<E> S;
  typedef unit_of<E> Unit;
  typedef BackwardBlocks<E> Blocks;
  static constexpr int64_t square = vector_bytes / int64_t(sizeof(Unit));
  const AttentionBackward& f;
  const int64_t longest_q;            // of any sequence
  int64_t d, dv;                      // head dims
  int64_t rows_d, rows_dv;            // of transposed operands
  int64_t units_d, units_dv;          // of rows
  int64_t depth_d, depth_dv, wide_d;  // of panels
  int64_t blocks_q, blocks_k, group;
  int64_t q_units, qt_units, o_units, ot_units, head_units;
  int64_t kt_units, vt_units, kn_units, block_units;

  BackwardOperands(const AttentionBackward& f, const Lengths& lengths)
      : f(f),
        longest_q(lengths.q),
        d(f.head_dim()),
        dv(f.head_dim_v()),
        rows_d(round_up(d, 16)),
        rows_dv(round_up(dv, 16)),
        units_d(row_units<E>(d)),
        units_dv(row_units<E>(dv)),
        depth_d(panel_depth<E>(d)),
        depth_dv(panel_depth<E>(dv)),
        wide_d(panel_columns<E>(d)),
        blocks_q((lengths.q + Blocks::queries - 1) / Blocks::queries),
        blocks_k((lengths.k + Blocks::keys - 1) / Blocks::keys),
        group(f.group()),
        q_units(Blocks::queries * units_d),
        qt_units(rows_d * Blocks::queries / E::per_unit),
        o_units(Blocks::queries * units_dv),
        ot_units(rows_dv * Blocks::queries / E::per_unit),
        head_units(E::planes * (q_units + qt_units + o_units + ot_units)),
        kt_units(depth_d * Blocks::keys),
        vt_units(depth_dv * Blocks::keys),
        kn_units(Blocks::keys / E::per_unit * wide_d),
        block_units(E::planes * (kt_units + vt_units + kn_units)) {}

  // Units, and Δ and lse, of everything that one (batch, key head) needs.
  int64_t units() const { return group * blocks_q * head_units + blocks_k * block_units; }
  int64_t statistics() const { return 2 * group * longest_q; }
  // Products write padded rows: each head's dq has room for them.
  int64_t dq_rows() const { return round_up(longest_q, Blocks::padding); }
  int64_t dq_size() const { return group * dq_rows() * wide_d; }

  Unit* queries(Unit* base, int64_t g, int64_t i) const {
    return base + (g * blocks_q + i) * head_units;
  }
  Rows<Unit> q(Unit* at) const { return {at, units_d, q_units}; }
  Rows<Unit> qt(Unit* at) const {
    return {at + E::planes * q_units, Blocks::queries / E::per_unit, qt_units};
  }
  Rows<Unit> o(Unit* at) const {
    return {at + E::planes * (q_units + qt_units), units_dv, o_units};
  }
  Rows<Unit> ot(Unit* at) const {
    return {at + E::planes * (q_units + qt_units + o_units), Blocks::queries / E::per_unit,
            ot_units};
  }

  Unit* keys(Unit* base, int64_t j) const {
    return base + group * blocks_q * head_units + j * block_units;
  }
  Panels<Unit> kt(Unit* at) const { return {at, depth_d, kt_units}; }
  Panels<Unit> vt(Unit* at) const { return {at + E::planes * kt_units, depth_dv, vt_units}; }
  Panels<Unit> kn(Unit* at) const {
    return {at + E::planes * (kt_units + vt_units), Blocks::keys / E::per_unit, kn_units};
  }

  int64_t scratch_units() const {
    return E::planes * larger(larger(units_d, units_dv) * square,
                              square * larger(wide_d, panel_columns<E>(dv)));
  }

  template <class T>
  bool pack_keys(int64_t b, int64_t h, int64_t j, Unit* base, Unit* scratch) const {
    const Sequence<int64_t> sequence = f.sequence(b);
    const int64_t rows = smaller(sequence.seq_k - j * Blocks::keys, Blocks::keys);
    if (rows <= 0) return true;
    const int64_t first = sequence.key_row(j * Blocks::keys);
    Unit* at = keys(base, j);
    const int64_t columns = round_up(rows, E::panel);
    const Source<T> k = source<T>(f.k, b, h, first), v = source<T>(f.v, b, h, first);
    pack_panels<E>(k, rows, d, round_up(rows, 2 * width<S>), kn(at));
    return pack_panels_transposed<E>(k, rows, d, columns, kt(at), scratch) &
           pack_panels_transposed<E>(v, rows, dv, columns, vt(at), scratch);
  }

  // `statistics`: lse, then Δ, for the queries of this head.
  template <class T>
  bool pack_queries(int64_t b, int64_t h, int64_t g, int64_t i, Unit* base, S* statistics,
                    Unit* scratch) const {
    const Sequence<int64_t> sequence = f.sequence(b);
    const int64_t i0 = i * Blocks::queries, first = sequence.query_row(i0);
    const int64_t rows = smaller(sequence.seq_q - i0, Blocks::queries);
    if (rows <= 0) return true;
    const int64_t given = f.dout ? rows : 0;
    Unit* at = queries(base, g, i);
    const int64_t padded = round_up(rows, Blocks::padding);
    const Source<T> from = source<T>(f.q, b, h, first), dout = source<T>(f.dout, b, h, first);
    pack_rows_transposed<E>(from, rows, d, padded, qt(at), scratch);
    pack_rows_transposed<E>(dout, given, dv, padded, ot(at), scratch);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first + r;
      S delta = f.dlse ? -*f.dlse.at<S>(b, h, row) : S(0);
      if (f.dout) delta += dot(source<T>(f.dout, b, h, row), source<T>(f.out, b, h, row), dv);
      statistics[i0 + r] = *f.lse.at<S>(b, h, row);
      statistics[longest_q + i0 + r] = delta;
    }
    return pack_rows<E>(from, rows, d, padded, q(at)) &
           pack_rows<E>(dout, given, dv, padded, o(at));
  }
};

}  // namespace fusedattn::FUSEDATTN_ISA
