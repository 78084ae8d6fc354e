// Softmax over the last dimension of (B, H, rows, width): s = scale · x + bias, −inf where masked;
// out = softmax(s), 0 in a row with nothing to see.
#pragma once

#include "kernel_table.h"

namespace fusedattn {

enum class SoftmaxCausal : int { none, top_left, bottom_right };

struct SoftmaxOptions {
  SoftmaxCausal causal = SoftmaxCausal::none;
  double scale = 1.0;
};

struct SoftmaxForward {
  TensorView x;     // any strides
  TensorView mask;  // bool, strides 0 where broadcast; may be absent
  TensorView bias;  // float, likewise, own dtype
  TensorView out;   // dtype of x
  SoftmaxOptions options;

  FUSEDATTN_MEMBER DType dtype() const { return x.dtype; }
  FUSEDATTN_MEMBER int64_t rows() const { return x.shape[0] * x.shape[1] * x.shape[2]; }
  FUSEDATTN_MEMBER int64_t width() const { return x.shape[3]; }
  FUSEDATTN_MEMBER int64_t work() const { return rows() * width(); }
};

struct SoftmaxBackward {
  TensorView dout, out;  // any strides
  TensorView dx;         // dtype of out; may be absent
  TensorView ds;         // float32 (float64 for float64), the gradient of s; may be absent
  SoftmaxOptions options;

  FUSEDATTN_MEMBER DType dtype() const { return out.dtype; }
  FUSEDATTN_MEMBER int64_t rows() const { return out.shape[0] * out.shape[1] * out.shape[2]; }
  FUSEDATTN_MEMBER int64_t width() const { return out.shape[3]; }
  FUSEDATTN_MEMBER int64_t work() const { return rows() * width(); }
};

using SoftmaxKernels = KernelTable<SoftmaxForward, SoftmaxBackward>;

}  // namespace fusedattn
