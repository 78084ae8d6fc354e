#include "norm_short.h"

namespace fusedattn::FUSEDATTN_ISA {

template <class T>
static void add(NormKernels& kernels) {
  if constexpr (served<T>) {
    kernel_for<NormForward>(kernels, dtype_of<T>) = {norm_forward<T>};
    kernel_for<NormBackward>(kernels, dtype_of<T>) = {norm_backward<T>};
  }
}

NormKernels norm_kernels() {
  NormKernels kernels;
  add<f16>(kernels);
  add<bf16>(kernels);
  add<float>(kernels);
  add<double>(kernels);
  return kernels;
}

}  // namespace fusedattn::FUSEDATTN_ISA
