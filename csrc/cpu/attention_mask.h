// A dense mask, cell by cell: where it hides everything nothing is computed, and where it hides
// nothing it is not read again. One pass over the mask finds out, before anything else.
#pragma once

#include "attention.h"
#include "gemm.h"
#include "workspace.h"

namespace fusedattn::FUSEDATTN_ISA {

class MaskMap {
  typedef uint8_t Cell;  // `sees` and `hides`, or both
  const TensorView& mask;
  int64_t queries, keys;  // of the mask's: 1 where it is broadcast
  int64_t batch, heads;
  int64_t cells_q, cells_k;
  Cell* cells = nullptr;  // (batch, heads, cells_q, cells_k)

 public:
  static constexpr int64_t rows = 32, columns = 64;  // of a cell
  enum : Cell { sees = 1, hides = 2 };

  explicit MaskMap(const AttentionForward& f)
      : mask(f.mask),
        queries(mask.stride[2] == 0 ? 1 : f.longest_q()),
        keys(mask.stride[3] == 0 ? 1 : f.longest_k()),
        batch(mask.stride[0] == 0 ? 1 : f.batch()),
        heads(mask.stride[1] == 0 ? 1 : f.heads()),
        cells_q((queries + rows - 1) / rows),
        cells_k((keys + columns - 1) / columns) {}

  // Nothing is known, and all of the mask is read, until there is room and every task has run.
  void take(Arena& arena) {
    if (mask) cells = arena.take<Cell>(batch * heads * cells_q * cells_k);
  }
  int64_t tasks() const { return mask ? batch * heads * cells_q : 0; }
  void run(int64_t task) {
    const int64_t head = task / cells_q, i = task % cells_q * rows;
    for (int64_t cell = 0; cell < cells_k; ++cell)
      cells[task * cells_k + cell] =
          look(head / heads, head % heads, i, smaller(rows, queries - i), cell * columns);
  }

  // What the mask does to queries [i, i + m) and keys [j, j + n), or more.
  Cell of(int64_t b, int64_t h, int64_t i, int64_t m, int64_t j, int64_t n) const {
    if (cells == nullptr) return mask ? sees | hides : sees;
    Cell found = 0;
    const Cell* row = row_of(b, h, i);
    for (int64_t rest = rows_in(i, m); rest > 0; --rest, row += cells_k)
      for (int64_t c = column_of(j); c <= column_of(j + n - 1); ++c) found |= row[c];
    return found;
  }

  // Of keys [j, j + n) so many that the others are hidden from queries [i, i + m).
  int64_t cut(int64_t b, int64_t h, int64_t i, int64_t m, int64_t j, int64_t n) const {
    if (cells == nullptr) return n;
    while (n > 0) {
      const int64_t last = j + n - 1, start = keys == 1 ? j : last / columns * columns;
      if (of(b, h, i, m, last, 1) & sees) break;
      n = larger(start - j, 0);
    }
    return n;
  }

  // −inf in a row of scores, that of query i and n keys from j on, for those that are hidden.
  template <class S>
  FUSEDATTN_MEMBER void apply(S* s, int64_t b, int64_t h, int64_t i, int64_t j, int64_t n) const {
    if (mask && n > 0 && of(b, h, i, 1, j, n) & hides)
      mask_row(mask.at<const uint8_t>(b, h, i, j), mask.stride[3], n, s);
  }

 private:
  int64_t column_of(int64_t j) const { return keys == 1 ? 0 : j / columns; }
  int64_t rows_in(int64_t i, int64_t m) const {
    return queries == 1 ? 1 : (i + m - 1) / rows - i / rows + 1;
  }
  const Cell* row_of(int64_t b, int64_t h, int64_t i) const {
    const int64_t head = (batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h);
    return cells + (head * cells_q + (queries == 1 ? 0 : i / rows)) * cells_k;
  }

  Cell look(int64_t b, int64_t h, int64_t i, int64_t m, int64_t j) const {
    const int64_t n = smaller(columns, keys - j), stride = mask.stride[3];
    uint8_t most = 0, least = 255;
    for (int64_t r = 0; r < m; ++r) {
      const uint8_t* row = mask.at<const uint8_t>(b, h, i + r, j);
      if (stride == 1 && n == columns) {
        for (int64_t c = 0; c < columns; ++c) {
          most = row[c] > most ? row[c] : most;
          least = row[c] < least ? row[c] : least;
        }
      } else {
        for (int64_t c = 0; c < n; ++c) {
          most = row[c * stride] > most ? row[c * stride] : most;
          least = row[c * stride] < least ? row[c * stride] : least;
        }
      }
    }
    return (most != 0 ? sees : 0) | (least == 0 ? hides : 0);
  }
};

}  // namespace fusedattn::FUSEDATTN_ISA
