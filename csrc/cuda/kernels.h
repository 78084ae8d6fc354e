// The CUDA kernels' entry points, one per parameter struct; <op>.cu defines those of its op. Each
// launches on the stream and on the device of the first tensor, and returns without waiting.
#pragma once

#include "attention.h"
#include "norm.h"
#include "rotary.h"
#include "sinusoidal.h"
#include "softmax.h"

namespace fusedattn::cuda {

void run(const AttentionForward& params, Stream stream);
void run(const AttentionBackward& params, Stream stream);
void run(const NormForward& params, Stream stream);
void run(const NormBackward& params, Stream stream);
void run(const SoftmaxForward& params, Stream stream);
void run(const SoftmaxBackward& params, Stream stream);
void run(const Rotary& params, Stream stream);
void run(const Sinusoidal& params, Stream stream);

}  // namespace fusedattn::cuda
