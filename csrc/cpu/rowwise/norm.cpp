#include "norm_short.h"

namespace fusedattn::FUSEDATTN_ISA {

NormKernels norm_kernels() {
  return by_dtype<NormKernels>([]<class T>(NormKernels& kernels, DType dtype) {
    kernel_for<NormForward>(kernels, dtype) = {norm_forward<T>};
    kernel_for<NormBackward>(kernels, dtype) = {norm_backward<T>};
  });
}

}  // namespace fusedattn::FUSEDATTN_ISA
