#define FUSEDATTN_ISA generic
#include "attention_kernels.h"

namespace fusedattn {

AttentionKernels attention_kernels_generic() { return generic::fma_kernels(); }

}  // namespace fusedattn
