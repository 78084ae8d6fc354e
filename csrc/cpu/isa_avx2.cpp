#define FUSEDATTN_ISA avx2
#include "attention_kernels.h"

namespace fusedattn {

AttentionKernels attention_kernels_avx2() { return avx2::fma_kernels(); }

}  // namespace fusedattn
