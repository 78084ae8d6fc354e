// The tiles of attention on sm_80 and later, by head dim: one table for each pass. A head dim is
// the larger one of D and Dv, rounded up to a row of the table.
//
// Shared memory decides between two columns. `large`: 163 KB for a block, 164 on a multiprocessor
// (sm_80; sm_90 and sm_100 have 227, 228). `little`: 99 and 100 (sm_86, sm_89, sm_120). A
// multiprocessor has 65536 registers, a thread at most 255, a resident block takes 1 KB of shared
// memory more than it asks for.
#pragma once

#include <initializer_list>

#include "cuda/common.cuh"

namespace fusedattn::cuda {

enum class Memory { large, little };

// What a device has that gives a block at most this much.
constexpr Memory memory_of(int max_shared_bytes) {
  return max_shared_bytes >= 163 * 1024 ? Memory::large : Memory::little;
}

// --- forward -------------------------------------------------------------------------------------

struct ForwardShape {
  int queries;       // of a block
  int keys;          // of a tile
  int warps;         // each has queries / warps queries, 16 or 32
  int slots;         // tiles of keys or values in shared memory
  int held;          // of the queries, columns that stay in registers; the others are read again
  int blocks;        // on a multiprocessor
  int shared_bytes;  // of a block
  int registers;     // of a thread

  constexpr int threads() const { return warps * warp_size; }
};

constexpr int forward_bytes(const ForwardShape& s, int head_dim) {
  return 2 * head_dim * (s.queries + s.slots * s.keys);
}

struct ForwardRow {
  int head_dim;
  ForwardShape large, little;
};

constexpr ForwardRow forward_rows[] = {
    {64, {128, 64, 4, 3, 64, 2, 40960, 255}, {128, 64, 4, 3, 64, 2, 40960, 255}},
    {96, {128, 64, 4, 3, 32, 2, 61440, 255}, {128, 64, 4, 2, 32, 2, 49152, 255}},
    {128, {128, 48, 4, 3, 0, 2, 69632, 255}, {128, 32, 4, 2, 0, 2, 49152, 255}},
    {192, {128, 64, 8, 3, 192, 1, 122880, 255}, {128, 64, 8, 2, 192, 1, 98304, 255}},
    {256, {128, 64, 8, 3, 0, 1, 163840, 255}, {128, 32, 8, 2, 0, 1, 98304, 255}},
};

constexpr ForwardShape forward_shape(int head_dim, Memory memory) {
  for (const ForwardRow& row : forward_rows)
    if (row.head_dim == head_dim) return memory == Memory::large ? row.large : row.little;
  return {};
}

// The narrowest row for these head dims; 0 where there is none.
constexpr int row_for(int64_t head_dim, int64_t head_dim_v) {
  const int64_t wider = head_dim > head_dim_v ? head_dim : head_dim_v;
  for (const ForwardRow& row : forward_rows)
    if (wider <= row.head_dim) return row.head_dim;
  return 0;
}

constexpr bool forward_rows_hold() {
  for (const ForwardRow& row : forward_rows)
    for (const Memory memory : {Memory::large, Memory::little}) {
      const ForwardShape s = forward_shape(row.head_dim, memory);
      const int per_block = memory == Memory::large ? 163 * 1024 : 99 * 1024;
      if (s.shared_bytes != forward_bytes(s, row.head_dim) || s.shared_bytes > per_block ||
          (s.shared_bytes + 1024) * s.blocks > per_block + 1024 ||
          s.registers * s.threads() * s.blocks > 65536)
        return false;
    }
  return true;
}
static_assert(forward_rows_hold());

}  // namespace fusedattn::cuda
