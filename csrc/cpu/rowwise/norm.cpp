#include "norm.h"

#include "vec.h"

namespace fusedattn::FUSEDATTN_ISA {

NormKernels norm_kernels() {
  NormKernels kernels;
  return kernels;
}

}  // namespace fusedattn::FUSEDATTN_ISA
