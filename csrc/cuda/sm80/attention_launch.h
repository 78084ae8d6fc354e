// The launchers of attention on sm_80 and later; one translation unit for each T and head dim.
#pragma once

#include "attention.h"
#include "attention_config.h"

namespace fusedattn::cuda {

// What blocks make of a part of the keys each, where these are split between them.
struct Parts {
  float* out = nullptr;  // (count, B · Hq, Sq, Dv)
  float* lse = nullptr;  // (count, B · Hq, Sq), in powers of 2
  uint32_t count = 1;
};

// p.out and p.lse from them, on the stream and the device of `launch`.
void launch_attention_combine(const AttentionForward& p, const Parts& parts, Launch launch);

// head_dim: a row of the tables. T is f16 or bf16, the dtype of q.
template <class T, int head_dim>
void launch_attention_forward(const AttentionForward& p, Stream stream);
template <class T, int head_dim>
void launch_attention_backward(const AttentionBackward& p, Stream stream);

}  // namespace fusedattn::cuda
