// The position of each row, for the ops that encode it: positions[b, i] or i, plus an offset.
#pragma once

#include "rowwise.h"

namespace fusedattn::FUSEDATTN_ISA {

struct Positions {
  const TensorView& positions;  // (1 or B, S) int32 or int64; may be absent
  int64_t start;

  // `offset` holds one integer that replaces `start`, or is absent.
  Positions(const TensorView& positions, const TensorView& offset, int64_t start)
      : positions(positions), start(offset ? offset.integer(0) : start) {}

  // All batches have the same positions.
  FUSEDATTN_MEMBER bool shared() const { return !positions || positions.stride[0] == 0; }

  FUSEDATTN_MEMBER int64_t at(int64_t b, int64_t i) const {
    const int64_t own =
        positions ? positions.integer(b * positions.stride[0] + i * positions.stride[1]) : i;
    // Wraps instead of being undefined where a sum leaves the range.
    return int64_t(uint64_t(own) + uint64_t(start));
  }
};

}  // namespace fusedattn::FUSEDATTN_ISA
