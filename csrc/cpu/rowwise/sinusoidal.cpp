#include "sinusoidal.h"

#include "vec.h"

namespace fusedattn::FUSEDATTN_ISA {

SinusoidalKernels sinusoidal_kernels() {
  SinusoidalKernels kernels;
  return kernels;
}

}  // namespace fusedattn::FUSEDATTN_ISA
