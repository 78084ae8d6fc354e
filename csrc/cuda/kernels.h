// The CUDA kernels' entry points, one per parameter struct; <op>.cu defines those of its op. Each
// launches on the stream and on the device of the first tensor, and returns without waiting.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "attention.h"
#include "norm.h"
#include "rotary.h"
#include "sinusoidal.h"
#include "softmax.h"

namespace fusedattn::cuda {

// A row of attention's table of tiles, for those who look at the machine code.
struct AttentionTiles {
  std::string kernel;  // attention_forward
  int head_dim;
  int memory;  // which instantiation: 0 much shared memory, 1 little, -1 one for both
  int threads, blocks, shared_bytes;
  std::array<int, 5> registers;  // sm_80, 86, 90, 100, 120; 0 where the row is not chosen
};
std::vector<AttentionTiles> attention_tiles();
// The release of nvcc that gave these registers.
std::string attention_registers_release();

void run(const AttentionForward& params, Stream stream);
void run(const AttentionBackward& params, Stream stream);
void run(const NormForward& params, Stream stream);
void run(const NormBackward& params, Stream stream);
void run(const SoftmaxForward& params, Stream stream);
void run(const SoftmaxBackward& params, Stream stream);
void run(const Rotary& params, Stream stream);
void run(const Sinusoidal& params, Stream stream);

}  // namespace fusedattn::cuda
