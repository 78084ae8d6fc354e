#define FUSEDATTN_ISA avx2
#include "attention_kernels.h"

namespace fusedattn::FUSEDATTN_ISA {

AttentionKernels attention_kernels() { return fma_kernels(); }

}  // namespace fusedattn::FUSEDATTN_ISA
