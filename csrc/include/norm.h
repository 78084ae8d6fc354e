// Layer norm and RMS norm: z = dropout(x) + residual; out = (z − mean) · rstd · weight + bias, with
// mean = 0 and weight + weight_offset for RMS. All matrices are (rows, width) with unit column
// stride; rows may lie at any distance.
#pragma once

#include "kernel_table.h"

namespace fusedattn {

struct NormOptions {
  bool centre = true;  // layer norm; else RMS norm
  double eps = 1e-5;
  double weight_offset = 0.0;
  double dropout_p = 0.0;
};

struct NormForward {
  TensorView x;             // (rows, width)
  TensorView residual;      // (rows, width), its own dtype; may be absent
  TensorView weight, bias;  // (width,), each its own dtype; may be absent
  TensorView seed;          // one int64; absent without dropout
  TensorView out;           // (rows, width) in the dtype of x
  TensorView z;             // (rows, width), own dtype: what is normalised; absent where z is x
  TensorView mean, rstd;    // (rows,) float32, float64 for float64; each may be absent
  NormOptions options;

  FUSEDATTN_MEMBER DType dtype() const { return x.dtype; }
  FUSEDATTN_MEMBER int64_t rows() const { return x.shape[0]; }
  FUSEDATTN_MEMBER int64_t width() const { return x.shape[1]; }
  FUSEDATTN_MEMBER int64_t work() const { return rows() * width(); }
};

struct NormBackward {
  TensorView dout;            // (rows, width) in the dtype of dx; may be absent: zero
  TensorView dz;              // gradient that reaches z past the norm; may be absent
  TensorView z;               // (rows, width)
  TensorView weight;          // (width,); may be absent
  TensorView mean, rstd;      // (rows,)
  TensorView seed;            // one int64; absent without dropout
  TensorView dx;              // (rows, width)
  TensorView dresidual;       // (rows, width), own dtype; may be absent
  TensorView dweight, dbias;  // (width,); may be absent
  NormOptions options;

  FUSEDATTN_MEMBER DType dtype() const { return dx.dtype; }
  FUSEDATTN_MEMBER int64_t rows() const { return dx.shape[0]; }
  FUSEDATTN_MEMBER int64_t width() const { return dx.shape[1]; }
  FUSEDATTN_MEMBER int64_t work() const { return rows() * width(); }
};

using NormKernels = KernelTable<NormForward, NormBackward>;

}  // namespace fusedattn
