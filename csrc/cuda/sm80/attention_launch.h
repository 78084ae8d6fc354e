// The launchers of attention on sm_80 and later; one translation unit for each T and head dim.
#pragma once

#include "attention.h"
#include "attention_config.h"

namespace fusedattn::cuda {

// head_dim: a row of the tables. T is f16 or bf16, the dtype of q.
template <class T, int head_dim>
void launch_attention_forward(const AttentionForward& p, Stream stream);
template <class T, int head_dim>
void launch_attention_backward(const AttentionBackward& p, Stream stream);

}  // namespace fusedattn::cuda
