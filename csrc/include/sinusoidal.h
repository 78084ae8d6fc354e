// Sinusoidal positions (Vaswani et al. 2017, §3.5), added in one pass:
// out[b, s, 2i] = scale · x + sin(p / base^(2i/W)), and cos in the odd features.
#pragma once

#include "kernel_table.h"

namespace fusedattn {

struct SinusoidalOptions {
  double base = 10000.0;
  double scale = 1.0;
  int64_t offset = 0;  // added to the row number, or to `positions`
};

struct Sinusoidal {
  TensorView x;          // (B, S, W), any strides
  TensorView positions;  // (1 or B, S) int32 or int64; may be absent
  TensorView offset;     // one int32 or int64, instead of options.offset; may be absent
  TensorView out;        // (B, S, W) in the dtype of x
  SinusoidalOptions options;

  FUSEDATTN_MEMBER DType dtype() const { return x.dtype; }
  FUSEDATTN_MEMBER int64_t work() const { return x.shape[0] * x.shape[1] * x.shape[2]; }
};

using SinusoidalKernels = KernelTable<Sinusoidal>;

}  // namespace fusedattn
