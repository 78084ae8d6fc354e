// Which tiles of an attention's scores are computed, and in which order; integers only, for host
// and device.
//
//   keys →     0 ……… full ……… end       of a tile of queries: the tiles of keys [0, full) are seen
//   queries    x x x x x \ - - - -       whole by each of its queries, [full, end) in part, the
//   ↓          x x x x x x \ - - -       others not at all
//
// and the same for a tile of keys, whose queries come from below the diagonal.
#pragma once

#include <cstdint>

#include "attention.h"

namespace fusedattn::cuda {

// What the queries of one head see: query i the keys before end(i). A window would add the first.
struct Sight {
  int64_t queries, keys;  // that exist
  int64_t diagonal;       // query i sees keys up to i + diagonal where causal
  bool causal;

  FUSEDATTN_MEMBER int64_t end(int64_t i) const {
    if (!causal) return keys;
    const int64_t past = i + diagonal + 1;
    return past < 0 ? 0 : past < keys ? past : keys;
  }
};

FUSEDATTN_MEMBER inline Sight sight(const AttentionForward& p, int64_t keys) {
  return {p.seq_q(), keys, p.diagonal(), p.options.causal != Causal::none};
}

FUSEDATTN_MEMBER inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles [begin, end) are visited. Of these [full_begin, full_end) need no mask: each of the queries
// that exist sees each key.
struct Tiles {
  int begin, full_begin, full_end, end;

  FUSEDATTN_MEMBER bool masked(int tile) const { return tile < full_begin || tile >= full_end; }
};

// Of `width` keys each, for queries first … first + rows - 1, the first of which exists.
FUSEDATTN_MEMBER inline Tiles key_tiles(const Sight& sight, int64_t first, int rows, int width) {
  const int64_t past = first + rows < sight.queries ? first + rows : sight.queries;
  return {0, 0, int(sight.end(first) / width), int(ceil_div(sight.end(past - 1), width))};
}

// Of `rows` queries each, for keys first … first + width - 1.
FUSEDATTN_MEMBER inline Tiles query_tiles(const Sight& sight, int64_t first, int rows, int width) {
  const int end = int(ceil_div(sight.queries, rows));
  if (first >= sight.keys) return {0, 0, 0, 0};
  const int64_t last = first + width - 1;
  const bool whole = last < sight.keys;
  if (!sight.causal) return {0, 0, whole ? end : 0, end};
  // The first queries that see any key and all keys of the tile.
  const int64_t any = first > sight.diagonal ? first - sight.diagonal : 0;
  const int64_t all = last > sight.diagonal ? last - sight.diagonal : 0;
  if (any >= sight.queries) return {0, 0, 0, 0};
  const int64_t full = ceil_div(all, rows);
  const int full_begin = full < end ? int(full) : end;
  return {int(any / rows), full_begin, whole ? end : full_begin, end};
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

}  // namespace fusedattn::cuda
