// Softmax on NVIDIA GPUs.
#include "softmax.h"

#include "common.cuh"
#include "kernels.h"

namespace fusedattn::cuda {

void run(const SoftmaxForward&, Stream) { throw std::runtime_error("not written yet"); }

void run(const SoftmaxBackward&, Stream) { throw std::runtime_error("not written yet"); }

}  // namespace fusedattn::cuda
