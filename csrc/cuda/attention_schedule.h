// Which tiles of an attention's scores are computed, and in which order; integers only, for host
// and device.
//
//   keys →     0 ……… full ……… end       of a tile of queries: the tiles of keys [0, full) are seen
//   queries    x x x x x \ - - - -       whole by each of its queries, [full, end) in part, the
//   ↓          x x x x x x \ - - -       others not at all
//
// and the same for a tile of keys, whose queries come from below the diagonal. A window cuts the
// left side off likewise.
#pragma once

#include <cstdint>

#include "attention.h"

namespace fusedattn::cuda {

template <class A, class B>
FUSEDATTN_MEMBER inline auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// Tiles [begin, end) are visited. Of these [full_begin, full_end) need no mask: each of the queries
// that exist sees each key.
struct Tiles {
  int begin, full_begin, full_end, end;

  FUSEDATTN_MEMBER bool masked(int tile) const { return tile < full_begin || tile >= full_end; }
};

// Of `width` keys each, for queries first … first + rows - 1, the first of which exists.
template <bool windowed>
FUSEDATTN_MEMBER inline Tiles key_tiles(const Sequence<int, windowed>& x, int first, int rows,
                                        int width) {
  const int past = first + rows < x.seq_q ? first + rows : x.seq_q;
  if (windowed && x.begin(first) >= x.end(past - 1)) return {0, 0, 0, 0};
  return {x.begin(first) / width, ceil_div(x.begin(past - 1), width), x.end(first) / width,
          ceil_div(x.end(past - 1), width)};
}

// Of `rows` queries each, for keys first … first + width - 1.
template <bool windowed>
FUSEDATTN_MEMBER inline Tiles query_tiles(const Sequence<int, windowed>& x, int first, int rows,
                                          int width) {
  const int last = first + width - 1;
  const int end = ceil_div(x.past_query(last < x.seq_k ? last : x.seq_k - 1), rows);
  // The first query that sees any key of the tile, and those that see all of them.
  const int any = x.first_query(first), all = x.first_query(last), past = x.past_query(first);
  if (first >= x.seq_k || any >= x.seq_q) return {end, end, end, end};
  const int full = ceil_div(all, rows), full_end = past < x.seq_q ? past / rows : end;
  if (last >= x.seq_k || full >= full_end) return {any / rows, end, end, end};
  return {any / rows, full, full_end, end};
}

// Which tile of which head a block works on.
struct Work {
  int tile, head;  // of B · H
};

// Blocks start in the order of their numbers. Heads are taken in sections, whose keys and values
// stay in the second-level cache together, and in a section all heads' last tile first: where
// causal that is the longest, and the short ones fill up the end.
FUSEDATTN_MEMBER inline Work work_of(uint32_t block, uint32_t tiles, uint32_t heads,
                                     uint32_t section) {
  const uint32_t first = block / (section * tiles) * section;
  const uint32_t width = heads - first < section ? heads - first : section;
  const uint32_t within = block - first * tiles;
  return {int(tiles - 1 - within / width), int(first + within % width)};
}

// How many heads make a section where the blocks of each read the same `bytes` of memory, in half
// of a `cache`: through the other half passes what is read and written once.
inline int64_t section_of(int64_t heads, int64_t bytes, int64_t cache) {
  const int64_t fit = bytes < cache / 2 ? cache / 2 / bytes : 1;
  return fit < heads ? fit : heads;
}

// Into how many parts the keys are split, each of them the work of a block: one where so many
// `blocks` fill a device that runs `wave` of them at a time. No part is so short that the copies
// ahead of it are most of it.
inline int64_t parts_of(int64_t blocks, int64_t wave, int64_t tiles) {
  constexpr int64_t least = 4;  // tiles of keys
  const int64_t fit = wave / blocks, most = tiles / least, parts = fit < most ? fit : most;
  return parts < 2 ? 1 : ceil_div(tiles, ceil_div(tiles, parts));
}

// Of tiles [first, past) those of one part: [begin, end). The last parts may have none.
struct Part {
  int begin, end;
};

FUSEDATTN_MEMBER inline Part part_of(int first, int past, int part, int parts) {
  const int each = ceil_div(past - first, parts), begin = first + part * each;
  return {begin, begin + each < past ? begin + each : past};
}

}  // namespace fusedattn::cuda
