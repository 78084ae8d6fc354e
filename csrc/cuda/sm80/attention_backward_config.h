// The tiles of attention's backward on sm_80 and later, by head dim.
#pragma once

#include "attention_config.h"

namespace fusedattn::cuda {

// Of attention_backward_keys.
struct KeysShape {
  int keys;     // of a tile, which stay
  int queries;  // of the tiles that pass by
  int warps;
  int column_warps;  // that share keys, each with its columns of dK and dV
  int step;          // queries whose scores a warp has at a time
  int stages;        // tiles of queries in shared memory
  int blocks;        // on a multiprocessor
};

constexpr int shared_bytes(const KeysShape& s, int head_dim) {
  const int scores = 2 * s.keys * s.queries * (s.column_warps > 1 ? 2 : 1);
  return 4 * s.keys * head_dim + scores + s.stages * s.queries * (4 * head_dim + 8);
}

// Of a device with at least 163 KB for a block, and of one with 99.
struct KeysRow {
  int head_dim;
  KeysShape large, little;
};

constexpr KeysRow keys_rows[] = {
    {64, {128, 64, 4, 1, 32, 2, 2}, {64, 64, 4, 1, 32, 1, 2}},
    {96, {128, 64, 8, 1, 64, 2, 1}, {128, 64, 8, 1, 32, 1, 1}},
    {128, {128, 64, 8, 1, 32, 2, 1}, {128, 32, 8, 1, 32, 1, 1}},
    {192, {64, 64, 8, 4, 16, 2, 1}, {64, 32, 8, 2, 16, 1, 1}},
    {256, {64, 64, 8, 4, 16, 1, 1}, {32, 32, 4, 2, 16, 1, 1}},
};

constexpr KeysShape keys_shape(int head_dim, Memory memory) {
  for (const KeysRow& row : keys_rows)
    if (row.head_dim == head_dim) return memory == Memory::large ? row.large : row.little;
  return {};
}

// Of attention_backward_queries.
struct QueriesShape {
  int queries;  // of a tile, which stay
  int keys;     // of the tiles that pass by
  int warps;
  int step;    // keys whose scores a warp has at a time
  int stages;  // tiles of keys in shared memory
  int blocks;  // on a multiprocessor
};

constexpr int shared_bytes(const QueriesShape& s, int head_dim) {
  return 4 * head_dim * (s.queries + s.stages * s.keys);
}

struct QueriesRow {
  int head_dim;
  QueriesShape shape;
};

constexpr QueriesRow queries_rows[] = {
    {64, {128, 64, 4, 32, 2, 2}}, {96, {128, 64, 8, 64, 2, 1}}, {128, {128, 32, 8, 32, 2, 1}},
    {192, {64, 32, 4, 32, 2, 1}}, {256, {64, 32, 4, 32, 1, 1}},
};

constexpr QueriesShape queries_shape(int head_dim) {
  for (const QueriesRow& row : queries_rows)
    if (row.head_dim == head_dim) return row.shape;
  return {};
}

// Each of keys_rows fits its class of shared memory as many times as it says; queries_rows, which
// serve both, fit the smaller one.
constexpr bool backward_rows_hold() {
  const auto fits = [](int bytes, int blocks, int per_block) {
    return bytes <= per_block && (bytes + 1024) * blocks <= per_block + 1024;
  };
  for (const KeysRow& row : keys_rows)
    if (!fits(shared_bytes(row.large, row.head_dim), row.large.blocks, 163 * 1024) ||
        !fits(shared_bytes(row.little, row.head_dim), row.little.blocks, 99 * 1024))
      return false;
  for (const QueriesRow& row : queries_rows)
    if (!fits(shared_bytes(row.shape, row.head_dim), 1, 99 * 1024)) return false;
  return true;
}
static_assert(backward_rows_hold());

// The terms of a head's queries are padded to whole tiles of any shape.
constexpr int row_padding = 128;

template <int head_dim, KeysShape shape>
struct DqFragments {
  static constexpr int threads = shape.warps * warp_size;
  static constexpr bool divides(int row_warps) {
    return shape.queries % (16 * row_warps) == 0 && shape.warps % row_warps == 0 &&
           head_dim % (16 * (shape.warps / row_warps)) == 0;
  }
  // 32 rows of a warp where that goes
  static constexpr int row_warps =
      divides(shape.queries / 32) ? shape.queries / 32 : shape.queries / 16;
  static_assert(divides(row_warps));
  static constexpr int column_warps = shape.warps / row_warps;
  static constexpr int m = shape.queries / row_warps / 16, n = head_dim / column_warps / 8;

  FUSEDATTN_DEVICE static int row() { return warp() / column_warps * 16 * m; }
  FUSEDATTN_DEVICE static int column() { return warp() % column_warps * 8 * n; }
  template <class P>
  FUSEDATTN_DEVICE static int64_t at(const P& p, uint32_t head, int tile) {
    return (int64_t(head) * p.dq_tiles + tile) * (shape.queries * head_dim) +
           warp() * (4 * m * n * warp_size) + lane();
  }
};

}  // namespace fusedattn::cuda
