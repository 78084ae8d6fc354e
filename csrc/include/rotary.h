// Rotary embedding (Su et al. 2021) of one or two tensors: pairs (a, b) of the first R features
// become (a·cos − b·sin, b·cos + a·sin); the others are copied.
#pragma once

#include "kernel_table.h"

namespace fusedattn {

struct RotaryOptions {
  bool interleaved = false;  // pairs (2i, 2i + 1); else (i, i + R/2)
  bool inverse = false;      // by −angle: the gradient
  int64_t offset = 0;        // added to the row number, or to `positions`
};

struct Rotary {
  TensorView x, x2;      // (B, H, S, D), any strides; x2 may be absent and differ in H
  TensorView cos, sin;   // (1 or B, T, R/2): rows by position, or by row number where B > 1
  TensorView positions;  // (1 or B, S) int32 or int64; may be absent
  TensorView offset;     // one int32 or int64, instead of options.offset; may be absent
  TensorView out, out2;  // as x, x2, or the same memory
  RotaryOptions options;

  FUSEDATTN_MEMBER DType dtype() const { return x.dtype; }
  FUSEDATTN_MEMBER int64_t work() const {
    return x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3];
  }
};

using RotaryKernels = KernelTable<Rotary>;

}  // namespace fusedattn
