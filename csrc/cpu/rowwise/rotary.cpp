#include "rotary.h"

#include "vec.h"

namespace fusedattn::FUSEDATTN_ISA {

RotaryKernels rotary_kernels() {
  RotaryKernels kernels;
  return kernels;
}

}  // namespace fusedattn::FUSEDATTN_ISA
