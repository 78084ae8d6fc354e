#include "softmax.h"

#include "vec.h"

namespace fusedattn::FUSEDATTN_ISA {

SoftmaxKernels softmax_kernels() {
  SoftmaxKernels kernels;
  return kernels;
}

}  // namespace fusedattn::FUSEDATTN_ISA
