#define FUSEDATTN_ISA avx512_bf16
#include "attention_kernels.h"
#include "bf16_dot.h"

namespace fusedattn::FUSEDATTN_ISA {

AttentionKernels attention_kernels() {
  AttentionKernels kernels;
  add<Bf16Dot, bf16>(kernels, DType::bf16);
  return kernels;
}

AttentionJvpKernels attention_jvp_kernels() {
  AttentionJvpKernels kernels;
  add<Bf16Dot, bf16>(kernels, DType::bf16);
  return kernels;
}

}  // namespace fusedattn::FUSEDATTN_ISA
