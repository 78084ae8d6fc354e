// The tiles of attention on sm_80 and later, both passes: one table, and beside each row what it
// takes. A head dim is the larger one of D and Dv, rounded up to a row.
//
// Shared memory decides between two rows of a head dim. `large`: 163 KB for a block, 164 on a
// multiprocessor (sm_80; sm_90 and sm_100 have 227, 228). `little`: 99 and 100 (sm_86, sm_89,
// sm_120). A third row serves both sizes, `ruled`: its kernels take every option and need more
// registers; what the other two do not take is in `needs_rules`. A resident block takes 1 KB more
// than it asks for. A multiprocessor has 65536 registers, a thread gets at most 255, in eights.
// Below, shared bytes are held to the layout and to the blocks of a row when compiling;
// tests/test_cuda_build.py holds the machine code's registers to the blocks.
//
// All of them stand against one limit, the 255 registers of a thread: a warp with 32 rows of its
// accumulators reads half as much shared memory for each product as one with 16, so rows of a warp
// are as many as fit, then columns of a step.
#pragma once

#include "cuda/common.cuh"

namespace fusedattn::cuda {

enum class Variant { large, little, ruled };

// Of a device that gives a block at most this much. Every target has the kernels of all: code for
// sm_80 runs on sm_86 as well, and PTX on what is still to come.
constexpr Variant variant_for(int max_shared_bytes) {
  return max_shared_bytes >= 163 * 1024 ? Variant::large : Variant::little;
}

template <class Shape>
struct Row {
  int head_dim;
  Shape large, little, ruled;
};

// --- forward -------------------------------------------------------------------------------------

struct ForwardShape {
  int queries;  // of a block
  int keys;     // of a tile
  int warps;    // each has queries / warps queries, 16 or 32
  int slots;    // tiles of keys or values in shared memory
  int held;     // of the queries, columns that stay in registers; the others are read again
  int blocks;   // on a multiprocessor
  int shared_bytes;

  constexpr int threads() const { return warps * warp_size; }
  constexpr int layout(int head_dim) const { return 2 * head_dim * (queries + slots * keys); }
};

// Up to 128, 32 queries of a warp and two blocks, so that one computes while the other waits at a
// barrier; above, out takes the registers of 32 queries and a warp has 16. What registers are left
// decides keys and held, shared memory decides slots and the keys of `little`.
constexpr Row<ForwardShape> forward_rows[] = {
    {64,
     {128, 64, 4, 3, 64, 2, 40960},
     {128, 64, 4, 3, 64, 2, 40960},
     {128, 64, 4, 3, 0, 2, 40960}},
    {96,
     {128, 64, 4, 3, 32, 2, 61440},
     {128, 64, 4, 2, 16, 2, 49152},
     {128, 32, 4, 3, 0, 2, 43008}},
    {128, {128, 48, 4, 3, 0, 2, 69632}, {128, 32, 4, 2, 0, 2, 49152}, {128, 64, 8, 3, 0, 1, 81920}},
    {192,
     {128, 64, 8, 3, 192, 1, 122880},
     {128, 64, 8, 2, 192, 1, 98304},
     {128, 64, 8, 2, 0, 1, 98304}},
    {256,
     {128, 64, 8, 3, 0, 1, 163840},
     {128, 32, 8, 2, 0, 1, 98304},
     {128, 32, 8, 2, 0, 1, 98304}},
};

// --- backward: dK and dV -------------------------------------------------------------------------

struct KeysShape {
  int keys;     // of a tile, which stay
  int queries;  // of the tiles that pass by
  int warps;
  int column_warps;  // that share keys, each with its columns of dK and dV
  int step;          // queries whose scores a warp has at a time
  int stages;        // tiles of queries in shared memory
  int blocks;        // on a multiprocessor
  int shared_bytes;

  constexpr int threads() const { return warps * warp_size; }
  constexpr int layout(int head_dim) const {
    const int scores = 2 * keys * queries * (column_warps > 1 ? 2 : 1);
    return 4 * keys * head_dim + scores + stages * queries * (4 * head_dim + 8);
  }
};

// dK and dV of a warp take at most 128 registers: 32 keys at 64 columns, or 16 at 128; from 192 on
// warps share keys to stay there. `little` gives up the second stage, then keys or queries.
constexpr Row<KeysShape> keys_rows[] = {
    {64,
     {128, 64, 4, 1, 32, 2, 2, 82944},
     {64, 64, 4, 1, 32, 1, 2, 41472},
     {64, 64, 4, 1, 32, 1, 2, 41472}},
    {96,
     {128, 64, 8, 1, 64, 2, 1, 115712},
     {128, 64, 8, 1, 32, 1, 1, 90624},
     {128, 64, 8, 1, 32, 1, 1, 90624}},
    {128,
     {128, 64, 8, 1, 32, 2, 1, 148480},
     {128, 32, 8, 1, 32, 1, 1, 90368},
     {128, 32, 8, 1, 16, 1, 1, 90368}},
    {192,
     {64, 64, 8, 4, 16, 2, 1, 164864},
     {64, 32, 8, 2, 16, 1, 1, 82176},
     {64, 32, 8, 2, 16, 1, 1, 82176}},
    {256,
     {64, 64, 8, 4, 16, 1, 1, 147968},
     {32, 32, 4, 2, 16, 1, 1, 69888},
     {32, 32, 4, 2, 16, 1, 1, 69888}},
};

// --- backward: dQ where it must be the same each time --------------------------------------------

struct QueriesShape {
  int queries;  // of a tile, which stay
  int keys;     // of the tiles that pass by
  int warps;
  int step;    // keys whose scores a warp has at a time
  int stages;  // tiles of keys in shared memory
  int blocks;  // on a multiprocessor with much shared memory; one on the others
  int shared_bytes;

  constexpr int threads() const { return warps * warp_size; }
  constexpr int layout(int head_dim) const { return 4 * head_dim * (queries + stages * keys); }
};

struct QueriesRow {
  int head_dim;
  QueriesShape large, ruled;
};

// `large` for both sizes, within 99 KB: dQ takes half the registers that dK and dV take, shared
// memory decides.
constexpr QueriesRow queries_rows[] = {
    {64, {128, 64, 4, 32, 2, 2, 65536}, {128, 64, 4, 16, 2, 2, 65536}},
    {96, {128, 64, 8, 64, 2, 1, 98304}, {128, 64, 8, 32, 2, 1, 98304}},
    {128, {128, 32, 8, 32, 2, 1, 98304}, {128, 32, 8, 32, 2, 1, 98304}},
    {192, {64, 32, 4, 32, 2, 1, 98304}, {64, 32, 4, 16, 2, 1, 98304}},
    {256, {64, 32, 4, 32, 1, 1, 98304}, {64, 32, 4, 16, 1, 1, 98304}},
};

// --- backward: a broadcast bias where its gradient must be the same each time --------------------

struct BiasRow {
  int head_dim;
  QueriesShape shape;
};

// Tiles of the bias, for both sizes; a warp has the scores of all keys of a tile at once.
constexpr BiasRow bias_rows[] = {
    {64, {64, 32, 4, 32, 1, 2, 24576}},  {96, {64, 32, 4, 32, 1, 2, 36864}},
    {128, {64, 64, 4, 64, 1, 1, 65536}}, {192, {64, 64, 4, 64, 1, 1, 98304}},
    {256, {64, 32, 4, 32, 1, 1, 98304}},
};

// --- rows by head dim ----------------------------------------------------------------------------

template <class Shape, int n>
constexpr Shape shape_in(const Row<Shape> (&rows)[n], int head_dim, Variant variant) {
  for (const Row<Shape>& row : rows)
    if (row.head_dim == head_dim)
      return variant == Variant::large    ? row.large
             : variant == Variant::little ? row.little
                                          : row.ruled;
  return {};
}

constexpr ForwardShape forward_shape(int head_dim, Variant variant) {
  return shape_in(forward_rows, head_dim, variant);
}

constexpr KeysShape keys_shape(int head_dim, Variant variant) {
  return shape_in(keys_rows, head_dim, variant);
}

constexpr QueriesShape queries_shape(int head_dim, Variant variant) {
  for (const QueriesRow& row : queries_rows)
    if (row.head_dim == head_dim) return variant == Variant::ruled ? row.ruled : row.large;
  return {};
}

constexpr QueriesShape bias_shape(int head_dim) {
  for (const BiasRow& row : bias_rows)
    if (row.head_dim == head_dim) return row.shape;
  return {};
}

// The narrowest row for these head dims; 0 where there is none.
constexpr int row_for(int64_t head_dim, int64_t head_dim_v) {
  const int64_t wider = head_dim > head_dim_v ? head_dim : head_dim_v;
  for (const Row<ForwardShape>& row : forward_rows)
    if (wider <= row.head_dim) return row.head_dim;
  return 0;
}

// --- what a row says holds -----------------------------------------------------------------------

template <class Shape>
constexpr bool holds(const Shape& s, int head_dim, int blocks, int per_block) {
  return s.shared_bytes == s.layout(head_dim) && s.shared_bytes <= per_block &&
         (s.shared_bytes + 1024) * blocks <= per_block + 1024;
}

constexpr bool rows_hold() {
  constexpr int large = 163 * 1024, little = 99 * 1024;
  for (const Row<ForwardShape>& row : forward_rows)
    if (!holds(row.large, row.head_dim, row.large.blocks, large) ||
        !holds(row.little, row.head_dim, row.little.blocks, little) ||
        !holds(row.ruled, row.head_dim, row.ruled.blocks, little))
      return false;
  for (const Row<KeysShape>& row : keys_rows)
    if (!holds(row.large, row.head_dim, row.large.blocks, large) ||
        !holds(row.little, row.head_dim, row.little.blocks, little) ||
        !holds(row.ruled, row.head_dim, row.ruled.blocks, little))
      return false;
  for (const QueriesRow& row : queries_rows)
    for (const QueriesShape& shape : {row.large, row.ruled})
      if (!holds(shape, row.head_dim, shape.blocks, large) ||
          !holds(shape, row.head_dim, 1, little))
        return false;
  for (const BiasRow& row : bias_rows)
    if (!holds(row.shape, row.head_dim, row.shape.blocks, little)) return false;
  return true;
}
static_assert(rows_hold());

}  // namespace fusedattn::cuda
