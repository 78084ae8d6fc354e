// The launchers of attention on sm_80 and later; one translation unit for each T and head dim.
#pragma once

#include "attention.h"
#include "attention_config.h"

namespace fusedattn::cuda {

// What blocks make of a part of the keys each, where these are split between them.
struct Parts {
  float* out = nullptr;  // (count, B · Hq, Sq, Dv)
  float* lse = nullptr;  // (count, B · Hq, Sq), without a sink
  uint32_t count = 1;
};

// Whether a call needs the variant that takes every option. The backward never looks at sinks: they
// are in the lse.
inline bool needs_rules(const AttentionForward& p) {
  const AttentionOptions& o = p.options;
  const bool window = o.window_left >= 0 || (o.window_right >= 0 && o.causal == Causal::none);
  return window || p.bias || p.alibi_slopes || p.cu_seqlens_q || o.dropout_p != 0;
}

// p.out and p.lse from them, on the stream and the device of `launch`.
void launch_attention_combine(const AttentionForward& p, const Parts& parts, Launch launch);

// What attention_backward_keys sums up for the slopes of ALiBi.
struct SlopeSums {
  const float* sums;  // (B · Hq, tiles, warps)
  int64_t tiles;      // of a head of keys
  int keys, warps;    // of a tile
};

// p.dalibi_slopes from them.
void launch_attention_slopes(const AttentionBackward& p, const SlopeSums& sums, Launch launch);

// dbias from fp32 sums of its shape, side by side.
void launch_attention_bias(const TensorView& dbias, const float* sums, Launch launch);

// head_dim: a row of the tables. T is f16 or bf16, the dtype of q.
template <class T, int head_dim>
void launch_attention_forward(const AttentionForward& p, Stream stream);
template <class T, int head_dim>
void launch_attention_backward(const AttentionBackward& p, Stream stream);

}  // namespace fusedattn::cuda
