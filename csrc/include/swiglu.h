// SwiGLU and its kin (Shazeer 2020): out = act(gate) ∘ up, each element by itself.
//
//   silu x·σ(x)    gelu x·Φ(x)    gelu_tanh x·σ(2√(2/π)·(x + 0.044715·x³))    relu max(x, 0)
//
// dgate = dout ∘ up ∘ act′(gate) and dup = dout ∘ act(gate).
#pragma once

#include "kernel_table.h"

namespace fusedattn {

enum class Activation : int { silu, gelu, gelu_tanh, relu };

struct SwigluOptions {
  Activation activation = Activation::silu;
};

struct SwigluForward {
  TensorView gate;  // (B, H, rows, W), columns of stride 1; (…, 2W) where it holds up as well
  TensorView up;    // (B, H, rows, W), likewise; absent where gate holds it
  TensorView out;   // (B, H, rows, W), likewise
  SwigluOptions options;

  FUSEDATTN_MEMBER DType dtype() const { return gate.dtype; }
  FUSEDATTN_MEMBER int64_t work() const {
    return out.shape[0] * out.shape[1] * out.shape[2] * out.shape[3];
  }
};

struct SwigluBackward {
  TensorView dout;        // as out
  TensorView gate, up;    // as in the forward
  TensorView dgate, dup;  // as gate and up
  SwigluOptions options;

  FUSEDATTN_MEMBER DType dtype() const { return gate.dtype; }
  FUSEDATTN_MEMBER int64_t work() const {
    return dout.shape[0] * dout.shape[1] * dout.shape[2] * dout.shape[3];
  }
};

using SwigluKernels = KernelTable<SwigluForward, SwigluBackward>;

// The halves of rows that hold both, as tensors of their own.
FUSEDATTN_MEMBER inline void split_halves(TensorView& gate, TensorView& up) {
  if (up) return;
  up = gate;
  gate.shape[3] = up.shape[3] = gate.shape[3] / 2;
  up.data = static_cast<char*>(gate.data) + gate.shape[3] * bytes_of(gate.dtype);
}

// Rows that follow each other without a gap, in all tensors of one shape, as one row.
template <int N>
FUSEDATTN_MEMBER inline void merge_rows(TensorView* const (&views)[N]) {
  for (int i = 2; i >= 0; --i) {
    const int64_t size = views[0]->shape[i];
    for (const TensorView* view : views)
      if (size != 1 && view->stride[i] != view->shape[3]) return;
    for (TensorView* view : views) {
      view->shape[3] *= size;
      view->shape[i] = 1;
    }
  }
}

// Each of the call's tensors by itself, their rows merged.
FUSEDATTN_MEMBER inline SwigluForward as_rows(SwigluForward p) {
  split_halves(p.gate, p.up);
  merge_rows({&p.gate, &p.up, &p.out});
  return p;
}

FUSEDATTN_MEMBER inline SwigluBackward as_rows(SwigluBackward p) {
  split_halves(p.gate, p.up);
  split_halves(p.dgate, p.dup);
  merge_rows({&p.dout, &p.gate, &p.up, &p.dgate, &p.dup});
  return p;
}

// Φ, the standard normal distribution, for floats and for vectors of them, by minimax polynomials.

// Φ(−y) for y >= 0, to 2e-7: e = exp(−y²/2) times the ratio of Mills, smooth in t = 1 / (1 +
// 0.35·y).
template <class V>
FUSEDATTN_MEMBER inline V normal_tail(V t, V e) {
  V p = t * -2.91459281e-02f + 1.43971682e-01f;
  p = p * t - 2.55714238e-01f;
  p = p * t + 1.59174129e-01f;
  p = p * t - 2.31098123e-02f;
  p = p * t + 1.05507992e-01f;
  p = p * t + 1.19832873e-01f;
  p = p * t + 1.39861867e-01f;
  p = p * t + 1.39621407e-01f;
  return p * t * e;
}

// Φ(x) for |x| < 1.25, where the tail's error is more than an ulp.
template <class V>
FUSEDATTN_MEMBER inline V normal_near_0(V x) {
  const V u = x * x;
  V p = u * -6.64486151e-06f + 1.10327463e-04f;
  p = p * u - 1.18270959e-03f;
  p = p * u + 9.97150037e-03f;
  p = p * u - 6.64899871e-02f;
  p = p * u + 3.98942262e-01f;
  return p * x + 0.5f;
}

}  // namespace fusedattn
