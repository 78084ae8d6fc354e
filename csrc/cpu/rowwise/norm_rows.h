// What the norms' forward and backward share: chunks, the division of work, the weights.
#pragma once

#include <type_traits>

#include "dropout.h"
#include "norm.h"
#include "rowwise.h"
#include "workspace.h"

namespace fusedattn::FUSEDATTN_ISA {

// Sums run in vectors of S over a chunk of a row and in double from chunk to chunk, in their order.
// So a row's result depends neither on the number of threads nor on the other rows. In short
// vectors a shorter chunk, whose sums are as long.
constexpr int64_t norm_chunk = width<float> < 8 ? 1024 : 2048;

FUSEDATTN_INLINE int64_t chunks_of(int64_t width) { return (width + norm_chunk - 1) / norm_chunk; }

constexpr int norm_block = 2;  // short rows that a thread takes together

// What one thread does: rows by columns. Few wide rows are split by columns (`split`): the threads
// then meet after each sum, but no thread converts weights or sums over rows for more than a chunk
// at a time. The second pass comes after all of the first, so more rows only while they are `near`.
struct Share {
  Range rows, columns;
};

struct Division {
  int64_t rows, width;
  int threads;
  bool split;

  FUSEDATTN_MEMBER Division(int64_t rows, int64_t width, bool near)
      : rows(rows), width(width), threads(threads_for_elements(rows * width)) {
    const int64_t share = chunks_of(width) / threads;
    const int64_t few = share == 0 ? 0 : share == 1 ? 4 : near ? 32 : 8;
    split = threads > 1 && rows < few * threads;
    if (!split && threads > rows) threads = int(rows);
  }

  // Of what threads keep for themselves.
  FUSEDATTN_MEMBER int copies() const { return split ? 1 : threads; }

  // At most.
  FUSEDATTN_MEMBER int64_t rows_each() const {
    return split ? rows : (rows + threads - 1) / threads;
  }

  FUSEDATTN_MEMBER Share share(int thread) const {
    const Range all_rows{0, rows}, all_columns{0, width};
    if (split) return {all_rows, part_of(width, thread, threads, norm_chunk)};
    return {part_of(rows, thread, threads), all_columns};
  }
};

// Whether rows had better be taken alone, where more than one tensor is read or written.
template <class T>
FUSEDATTN_INLINE bool is_long(const Division& division) {
  return division.width * int64_t(sizeof(T)) >= 2048;
}

// offset + weight (or the bias) as S: read in place where it is stored so, else converted, whole
// and once for all rows, or a chunk at a time for a few wide ones.
template <class S>
struct Parameter {
  const TensorView* tensor = nullptr;
  S offset = 0;
  bool converts = false;
  S* scratch = nullptr;

  // Absent ones are 1 where the caller has no other case for them.
  FUSEDATTN_MEMBER Parameter(const TensorView& tensor, double offset, bool or_ones,
                             const Division& division, Arena& arena)
      : tensor(&tensor), offset(S(offset)) {
    const bool in_place = tensor.dtype == dtype_of<S> && offset == 0;
    converts = tensor ? !in_place : or_ones;
    if (converts && !division.split) scratch = arena.take<S>(division.width);
  }

  void convert_all(int64_t width) const {
    if (scratch) convert({0, width}, scratch);
  }
  // From a column on, after `convert_all`; null where there is none.
  FUSEDATTN_MEMBER const S* from(int64_t column) const {
    const S* const whole = scratch ? scratch : static_cast<const S*>(tensor->data);
    return whole ? whole + column : nullptr;
  }
  // Those columns; `here` has room for them.
  const S* chunk(Range columns, S* here) const {
    if (!converts) return from(columns.begin);
    convert(columns, here);
    return here;
  }

 private:
  void convert(Range columns, S* to) const {
    const int64_t n = columns.end - columns.begin;
    if (*tensor) read_row(*tensor, 0, columns.begin, n, to);
    for_vectors<S>(n, [&](int64_t i, auto lanes) {
      set<S>(to + i, *tensor ? get<S>(to + i, lanes) + offset : splat(S(1)), lanes);
    });
  }
};

constexpr int64_t rows_at_once = 8;  // of few wide ones, over each chunk

// f(first column, columns) over the chunks of a range.
template <class F>
FUSEDATTN_INLINE void for_chunks(Range columns, const F& f) {
  for (int64_t c = columns.begin; c < columns.end; c += norm_chunk)
    f(c, columns.end - c < norm_chunk ? columns.end - c : norm_chunk);
}

// Multiplying by a power of two before subtracting and squaring keeps rows near the largest and
// the smallest numbers from overflowing and vanishing.
template <class S>
constexpr double shrink = 0x1p-80;
template <>
constexpr double shrink<double> = 0x1p-600;
template <class S>
constexpr double vanishing = 0x1p-100;  // squares below this have lost digits
template <>
constexpr double vanishing<double> = 0x1p-900;

}  // namespace fusedattn::FUSEDATTN_ISA
