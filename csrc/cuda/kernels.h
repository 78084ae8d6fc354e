// The CUDA kernels' entry points, one per parameter struct; <op>.cu defines those of its op. Each
// launches on the stream and on the device of the first tensor, and returns without waiting.
#pragma once

#include <string>
#include <vector>

#include "ops.h"

namespace fusedattn::cuda {

// A row of attention's table of tiles, for those who look at the machine code.
struct AttentionTiles {
  std::string kernel;  // attention_forward
  int head_dim;
  int variant;  // which instantiation: 0 much shared memory or any, 1 little, 2 every option
  int threads, blocks, shared_bytes;
};
std::vector<AttentionTiles> attention_tiles();

#define FUSEDATTN_DECLARE(op, Forward, ...) \
  void run(const Forward&, Stream);         \
  __VA_OPT__(void run(const __VA_ARGS__&, Stream);)
FUSEDATTN_OPS(FUSEDATTN_DECLARE)
#undef FUSEDATTN_DECLARE

}  // namespace fusedattn::cuda
