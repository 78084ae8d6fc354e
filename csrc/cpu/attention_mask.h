// Dense masks and masks by rule, cell by cell: where all is hidden nothing is computed, and where
// nothing is hidden no mask is read. One pass over them finds out, before anything else; of a
// prefix it is plain arithmetic.
#pragma once

#include "attention.h"
#include "gemm.h"
#include "workspace.h"

namespace fusedattn::FUSEDATTN_ISA {

class MaskMap {
  typedef uint8_t Cell;  // `sees` and `hides`, or both
  const AttentionForward& f;
  const bool any;         // of what is mapped
  int64_t queries, keys;  // of the map: 1 where a dense mask is broadcast
  int64_t batch, heads;
  int64_t cells_q, cells_k;
  Cell* cells = nullptr;  // (batch, heads, cells_q, cells_k)

 public:
  static constexpr int64_t rows = 32, columns = 64;  // of a cell
  enum : Cell { sees = 1, hides = 2 };

  explicit MaskMap(const AttentionForward& f)
      : f(f),
        any(f.mask || f.documents_q || f.mask_blocks),
        queries(shared(2) ? 1 : f.longest_q()),
        keys(shared(3) ? 1 : f.longest_k()),
        batch(shared(0) && !f.documents_q.stride[0] && !f.documents_k.stride[0] ? 1 : f.batch()),
        heads(shared(1) ? 1 : f.heads()),
        cells_q((queries + rows - 1) / rows),
        cells_k((keys + columns - 1) / columns) {}

  // Nothing is known, and all masks are read, until there is room and every task has run.
  void take(Arena& arena) {
    if (any) cells = arena.take<Cell>(batch * heads * cells_q * cells_k);
  }
  int64_t tasks() const { return any ? batch * heads * cells_q : 0; }
  void run(int64_t task) {
    const int64_t head = task / cells_q, i = task % cells_q * rows;
    for (int64_t cell = 0; cell < cells_k; ++cell)
      cells[task * cells_k + cell] =
          look(head / heads, head % heads, i, smaller(rows, queries - i), cell * columns);
  }

  // What is done to queries [i, i + m) and keys [j, j + n), or more.
  Cell of(int64_t b, int64_t h, int64_t i, int64_t m, int64_t j, int64_t n) const {
    const Cell found = mapped(b, h, i, m, j, n);
    if (!f.prefix_lengths) return found;
    const int64_t end_of_first = prefix_end(b, i), end_of_last = prefix_end(b, i + m - 1);
    return both(found, end_of_last > j, end_of_first < j + n);
  }

  // Of keys [j, j + n) so many that the others are hidden from queries [i, i + m).
  int64_t cut(int64_t b, int64_t h, int64_t i, int64_t m, int64_t j, int64_t n) const {
    if (f.prefix_lengths) n = larger(smaller(prefix_end(b, i + m - 1) - j, n), 0);
    if (cells == nullptr) return n;
    while (n > 0) {
      const int64_t last = j + n - 1, start = keys == 1 ? j : last / columns * columns;
      if (mapped(b, h, i, m, last, 1) & sees) break;
      n = larger(start - j, 0);
    }
    return n;
  }

  // Whether a dense mask shows query i any of n keys from j on; for those who make no map.
  FUSEDATTN_MEMBER bool shows(int64_t b, int64_t h, int64_t i, int64_t j, int64_t n) const {
    if (!f.mask) return true;
    const uint8_t* row = f.mask.at<const uint8_t>(b, h, i, j);
    uint8_t any_of_them = 0;
    for (int64_t c = 0; c < n; ++c) any_of_them |= row[c * f.mask.stride[3]];
    return any_of_them != 0;
  }

  // −inf in a row of scores, that of query i and n keys from j on, for those that are hidden.
  template <class S>
  FUSEDATTN_MEMBER void apply(S* s, int64_t b, int64_t h, int64_t i, int64_t j, int64_t n) const {
    if (f.prefix_lengths)
      for (int64_t c = larger(prefix_end(b, i) - j, 0); c < n; ++c) s[c] = -infinity<S>;
    if (!any || n <= 0 || !(mapped(b, h, i, 1, j, n) & hides)) return;
    if (f.mask) mask_row(f.mask.at<const uint8_t>(b, h, i, j), f.mask.stride[3], n, s);
    if (f.documents_q) hide_documents(s, b, i, j, n);
    if (f.mask_blocks) {
      const int64_t size = f.options.block_size;
      for (int64_t c = 0, past; c < n; c = past) {
        past = smaller(((j + c) / size + 1) * size - j, n);
        if (!*f.mask_blocks.at<const uint8_t>(b, h, i / size, (j + c) / size))
          for (int64_t hidden = c; hidden < past; ++hidden) s[hidden] = -infinity<S>;
      }
    }
  }

 private:
  // Whether the map is one for all of a dimension. Rules differ along queries and keys.
  bool shared(int dimension) const {
    const bool of_rules = dimension < 2 ? !f.mask_blocks || f.mask_blocks.stride[dimension] == 0
                                        : !f.documents_q && !f.mask_blocks;
    return of_rules && (!f.mask || f.mask.stride[dimension] == 0);
  }

  // The first key that neither the prefix nor the causal mask behind it shows to query i.
  int64_t prefix_end(int64_t b, int64_t i) const {
    const int64_t length = f.prefix_lengths.integer(b * f.prefix_lengths.stride[0]);
    return larger(length, i + f.sequence(b).offset + 1);
  }

  static Cell both(Cell found, bool seen, bool hidden) {
    return (seen ? found & sees : 0) | (hidden ? hides : found & hides);
  }

  Cell mapped(int64_t b, int64_t h, int64_t i, int64_t m, int64_t j, int64_t n) const {
    if (cells == nullptr) return any ? sees | hides : sees;
    Cell found = 0;
    const Cell* row = row_of(b, h, i);
    for (int64_t rest = rows_in(i, m); rest > 0; --rest, row += cells_k)
      for (int64_t c = column_of(j); c <= column_of(j + n - 1); ++c) found |= row[c];
    return found;
  }

  int64_t column_of(int64_t j) const { return keys == 1 ? 0 : j / columns; }
  int64_t rows_in(int64_t i, int64_t m) const {
    return queries == 1 ? 1 : (i + m - 1) / rows - i / rows + 1;
  }
  const Cell* row_of(int64_t b, int64_t h, int64_t i) const {
    const int64_t head = (batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h);
    return cells + (head * cells_q + (queries == 1 ? 0 : i / rows)) * cells_k;
  }

  Cell look(int64_t b, int64_t h, int64_t i, int64_t m, int64_t j) const {
    const int64_t n = smaller(columns, keys - j);
    Cell found = sees;
    if (f.mask_blocks) found = look_at_blocks(found, b, h, i, m, j, n);
    if (found & sees && f.documents_q) found = look_at_documents(found, b, i, m, j, n);
    if (found & sees && f.mask) found = look_at_dense(found, b, h, i, m, j, n);
    return found;
  }

  Cell look_at_dense(Cell found, int64_t b, int64_t h, int64_t i, int64_t m, int64_t j,
                     int64_t n) const {
    const int64_t stride = f.mask.stride[3];
    uint8_t most = 0, least = 255;
    for (int64_t r = 0; r < m; ++r) {
      const uint8_t* row = f.mask.at<const uint8_t>(b, h, i + r, j);
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
    return both(found, most != 0, least == 0);
  }

  Cell look_at_blocks(Cell found, int64_t b, int64_t h, int64_t i, int64_t m, int64_t j,
                      int64_t n) const {
    const int64_t size = f.options.block_size;
    bool seen = false, hidden = false;
    for (int64_t r = i / size; r <= (i + m - 1) / size; ++r)
      for (int64_t c = j / size; c <= (j + n - 1) / size; ++c)
        (*f.mask_blocks.at<const uint8_t>(b, h, r, c) ? seen : hidden) = true;
    return both(found, seen, hidden);
  }

  struct Range {
    int64_t least, most;
  };
  static Range range_of(const TensorView& ids, int64_t b, int64_t first, int64_t n) {
    Range found{INT64_MAX, INT64_MIN};
    for (int64_t at = first; at < first + n; ++at) {
      const int64_t id = ids.integer(ids.offset(b, at));
      found = {smaller(found.least, id), larger(found.most, id)};
    }
    return found;
  }
  Cell look_at_documents(Cell found, int64_t b, int64_t i, int64_t m, int64_t j, int64_t n) const {
    const Range q = range_of(f.documents_q, b, i, m), k = range_of(f.documents_k, b, j, n);
    const bool one = q.least == q.most && k.least == k.most && q.least == k.least;
    return both(found, q.least <= k.most && k.least <= q.most, !one);
  }

  template <class S>
  FUSEDATTN_MEMBER void hide_documents(S* s, int64_t b, int64_t i, int64_t j, int64_t n) const {
    const TensorView& ids = f.documents_k;
    const int64_t own = f.documents_q.integer(f.documents_q.offset(b, i));
    const auto hide = [&]<class Id>(Id) {
      const Id* const id = ids.at<const Id>(b, j);
      for (int64_t c = 0; c < n; ++c) s[c] = id[c * ids.stride[1]] == own ? s[c] : -infinity<S>;
    };
    ids.dtype == DType::i32 ? hide(int32_t()) : hide(int64_t());
  }
};

}  // namespace fusedattn::FUSEDATTN_ISA
