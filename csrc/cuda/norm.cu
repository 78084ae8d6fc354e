// Layer norm and RMS norm on NVIDIA GPUs.
#include "norm.h"

#include "common.cuh"
#include "kernels.h"

namespace fusedattn::cuda {

void run(const NormForward&, Stream) { throw std::runtime_error("not written yet"); }

void run(const NormBackward&, Stream) { throw std::runtime_error("not written yet"); }

}  // namespace fusedattn::cuda
