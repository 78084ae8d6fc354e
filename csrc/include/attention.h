// Attention's parameters, shared by every native backend. Shapes: q (B, Hq, Sq, D),
// k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), out (B, Hq, Sq, Dv), lse (B, Hq, Sq).
#pragma once

#include "kernel_table.h"

namespace fusedattn {

enum class Causal : int { none, top_left, bottom_right };

// deterministic: the same gradients each time, where a kernel would otherwise add them in any
// order.
struct AttentionOptions {
  Causal causal = Causal::none;
  double scale = 1.0;
  bool deterministic = false;
  double softcap = 0.0;  // c: scores are c · tanh(scale · q kᵀ / c) + bias; 0 for none
};

struct AttentionForward {
  TensorView q, k, v;
  TensorView mask;        // bool, strides 0 where broadcast; may be absent
  TensorView bias;        // float, likewise
  TensorView kv_lengths;  // (B,) int32 or int64, of any value; may be absent
  TensorView out, lse;
  AttentionOptions options;

  FUSEDATTN_MEMBER DType dtype() const { return q.dtype; }
  FUSEDATTN_MEMBER int64_t work() const { return seq_q() * seq_k(); }
  FUSEDATTN_MEMBER int64_t batch() const { return q.shape[0]; }
  FUSEDATTN_MEMBER int64_t heads() const { return q.shape[1]; }
  FUSEDATTN_MEMBER int64_t heads_kv() const { return k.shape[1]; }
  FUSEDATTN_MEMBER int64_t group() const { return heads() / heads_kv(); }
  FUSEDATTN_MEMBER int64_t seq_q() const { return q.shape[2]; }
  FUSEDATTN_MEMBER int64_t seq_k() const { return k.shape[2]; }
  FUSEDATTN_MEMBER int64_t head_dim() const { return q.shape[3]; }
  FUSEDATTN_MEMBER int64_t head_dim_v() const { return v.shape[3]; }

  // The keys of batch entry b that exist.
  FUSEDATTN_MEMBER int64_t keys(int64_t b) const {
    if (!kv_lengths) return seq_k();
    const int64_t n = kv_lengths.integer(b * kv_lengths.stride[0]);
    return n < 0 ? 0 : n < seq_k() ? n : seq_k();
  }

  // Query i sees keys [0, i + diagonal()] where causal.
  FUSEDATTN_MEMBER int64_t diagonal() const {
    return options.causal == Causal::bottom_right ? seq_k() - seq_q() : 0;
  }

  // One past the last key that query i sees, given n existing keys.
  FUSEDATTN_MEMBER int64_t keys_seen(int64_t i, int64_t n) const {
    if (options.causal == Causal::none) return n;
    const int64_t end = i + diagonal() + 1;
    return end < 0 ? 0 : end < n ? end : n;
  }

  // The first query that sees key j.
  FUSEDATTN_MEMBER int64_t first_query(int64_t j) const {
    if (options.causal == Causal::none) return 0;
    const int64_t i = j - diagonal();
    return i < 0 ? 0 : i;
  }
};

struct AttentionBackward : AttentionForward {
  TensorView dout, dlse;  // either may be absent: zero
  TensorView dq, dk, dv;
  TensorView dbias;  // the shape of bias; may be absent
};

using AttentionKernels = KernelTable<AttentionForward, AttentionBackward>;

}  // namespace fusedattn
