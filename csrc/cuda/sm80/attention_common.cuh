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

using Unwindowed = Sequence<int, false>;  // a window is refused before: attention.cu

// AttentionForward::sequence in 32 bits, which make masks cheap: lengths are less than 2³¹ less a
// tile, and kv_lengths int32.
FUSEDATTN_DEVICE Unwindowed sequence_of(const AttentionForward& p, int64_t b) {
  int keys = int(p.longest_k());
  if (present(p.kv_lengths)) {
    const int n = load(static_cast<const int32_t*>(p.kv_lengths.data) + b * p.kv_lengths.stride[0]);
    keys = n < 0 ? 0 : n < p.longest_k() ? n : keys;
  }
  return p.with_keys<int, false>(keys);
}

}  // namespace fusedattn::cuda
