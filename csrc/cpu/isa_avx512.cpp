#define FUSEDATTN_ISA avx512
#include "attention_kernels.h"

namespace fusedattn {

AttentionKernels attention_kernels_avx512() { return avx512::fma_kernels(); }

}  // namespace fusedattn
