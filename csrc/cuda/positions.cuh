// The position of a row, for the kernels that encode it: rotary and sinusoidal.
#pragma once

#include "common.cuh"

namespace fusedattn::cuda {

// positions[batch, row], or the row's number where there are none, plus the offset: a number in
// memory, if there is one, else `start`.
FUSEDATTN_DEVICE int64_t position_of(const TensorView& positions, const TensorView& offset,
                                     int64_t start, int64_t batch, int64_t row) {
  if (offset) start = load_integer(offset, 0);
  if (!positions) return row + start;
  const int64_t sheet = positions.shape[0] == 1 ? 0 : batch;
  return start + load_integer(positions, sheet * positions.stride[0] + row * positions.stride[1]);
}

}  // namespace fusedattn::cuda
