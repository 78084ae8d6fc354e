#define FUSEDATTN_ISA generic
#include "attention_kernels.h"

namespace fusedattn::FUSEDATTN_ISA {

AttentionKernels attention_kernels() { return fma_kernels<AttentionKernels>(); }
AttentionJvpKernels attention_jvp_kernels() { return fma_kernels<AttentionJvpKernels>(); }

}  // namespace fusedattn::FUSEDATTN_ISA
