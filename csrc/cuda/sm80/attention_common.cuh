// What attention's kernels share: where the rows of a head lie, and which of them are a sequence's.
#pragma once

#include "attention.h"
#include "cuda/attention_schedule.h"
#include "tile.cuh"

namespace fusedattn::cuda {

constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;

// Here no tensor is empty, and the address, which is needed anyway, says whether there is one in
// fewer registers.
FUSEDATTN_DEVICE bool present(const TensorView& view) { return view.data != nullptr; }

// Rows of one head, from `first` on; none where there is no tensor, and copy_tile then makes zeros.
FUSEDATTN_DEVICE Rows rows_of(const TensorView& view, int64_t b, int64_t h, int64_t first) {
  return {present(view) ? view.at<uint16_t>(b, h, first) : nullptr, view.stride[2]};
}
FUSEDATTN_DEVICE int width_of(const TensorView& view) {
  return present(view) ? int(view.shape[3]) : 0;
}

// --- sequences -----------------------------------------------------------------------------------

// AttentionForward::sequence in 32 bits, which make masks cheap: lengths are less than 2³¹ less a
// tile, and kv_lengths int32. Not of packed ones.
template <bool windowed>
FUSEDATTN_DEVICE Sequence<int, windowed> sequence_of(const AttentionForward& p, int64_t b) {
  int keys = int(p.longest_k());
  if (present(p.kv_lengths)) {
    const int n = load(static_cast<const int32_t*>(p.kv_lengths.data) + b * p.kv_lengths.stride[0]);
    keys = n < 0 ? 0 : n < p.longest_k() ? n : keys;
  }
  return p.with_keys<int, windowed>(keys);
}

enum class Side { queries, keys };

// Packed sequences lie side by side, and nobody on the host knows their lengths. Number b has no
// tile before number first / width + b of a head, `first` being its first row; rows past the last
// offset are one sequence more, which has nothing on the other side. So a head has this many tiles
// at most, of which those that no rows fall into have nothing to do.
FUSEDATTN_MEMBER inline int64_t tiles_of(const AttentionForward& p, Side side, int64_t width) {
  const int64_t rows = side == Side::keys ? p.longest_k() : p.longest_q();
  return p.cu_seqlens_q ? rows / width + p.sequences() + 1 : ceil_div(rows, width);
}

// Where packed sequence b begins; in the tensor, whatever the offset is.
FUSEDATTN_DEVICE int packed_row(const TensorView& cu_seqlens, int b, int64_t rows) {
  const int64_t at = load_integer(cu_seqlens, b * cu_seqlens.stride[0]);
  return int(at < 0 ? 0 : at < rows ? at : rows);
}

// A tile of the batch: the number `tile` of sequence number b.
template <bool ruled>
struct Place {
  Sequence<int, ruled> sequence;
  int b, tile;
};

FUSEDATTN_DEVICE Place<true> packed_place(const AttentionForward& p, int tile, Side side,
                                          int width) {
  const bool of_keys = side == Side::keys;
  const TensorView &cu_q = p.cu_seqlens_q, &cu_k = p.cu_seqlens_k;
  const int rows_q = int(p.longest_q()), rows_k = int(p.longest_k()), count = int(p.sequences());
  int b = 0, last = count;
  while (b < last) {
    const int middle = (b + last + 1) / 2;
    const int first = of_keys ? packed_row(cu_k, middle, rows_k) : packed_row(cu_q, middle, rows_q);
    if (first / width + middle <= tile)
      b = middle;
    else
      last = middle - 1;
  }
  const int first_q = packed_row(cu_q, b, rows_q), first_k = packed_row(cu_k, b, rows_k);
  int end_q = of_keys ? first_q : rows_q, end_k = of_keys ? rows_k : first_k;
  if (b < count) {
    end_q = packed_row(cu_q, b + 1, rows_q);
    end_k = packed_row(cu_k, b + 1, rows_k);
  }
  Place<true> place = {p.packed_sequence<int>(first_q, end_q, first_k, end_k), b, 0};
  const int begin = (of_keys ? first_k : first_q) / width + b;
  place.tile = tile > begin ? tile - begin : 0;
  Sequence<int>& sequence = place.sequence;
  // The tile is in none, and has nothing on the other side.
  if (place.tile * width >= (of_keys ? sequence.seq_k : sequence.seq_q))
    (of_keys ? sequence.seq_q : sequence.seq_k) = 0;
  return place;
}

// Of tile `tile` of a head of batch entry b; tiles have `width` rows.
template <bool ruled>
FUSEDATTN_DEVICE Place<ruled> place_of(const AttentionForward& p, int b, int tile, Side side,
                                       int width) {
  if constexpr (ruled)
    if (present(p.cu_seqlens_q)) return packed_place(p, tile, side, width);
  return {sequence_of<ruled>(p, b), b, tile};
}

}  // namespace fusedattn::cuda
