// What attention's kernels share: where the rows of a head lie, and how many keys there are.
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

// Rows of one head; none where there is no tensor, and copy_tile then makes zeros.
FUSEDATTN_DEVICE Rows rows_of(const TensorView& view, int64_t b, int64_t h) {
  return {present(view) ? view.at<uint16_t>(b, h) : nullptr, view.stride[2]};
}
FUSEDATTN_DEVICE int width_of(const TensorView& view) {
  return present(view) ? int(view.shape[3]) : 0;
}

// The keys of batch entry b that exist; the lengths are int32.
FUSEDATTN_DEVICE int existing_keys(const AttentionForward& p, int64_t b) {
  if (!present(p.kv_lengths)) return int(p.seq_k());
  const int n = load(static_cast<const int32_t*>(p.kv_lengths.data) + b * p.kv_lengths.stride[0]);
  return n < 0 ? 0 : n < p.seq_k() ? n : int(p.seq_k());
}

}  // namespace fusedattn::cuda
