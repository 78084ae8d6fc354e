#define FUSEDATTN_ISA avx512_bf16
#include "attention_kernels.h"
#include "bf16_dot.h"

namespace fusedattn {

AttentionKernels attention_kernels_avx512_bf16() {
  AttentionKernels kernels;
  avx512_bf16::add<avx512_bf16::Bf16Dot, avx512_bf16::bf16>(kernels, DType::bf16);
  return kernels;
}

}  // namespace fusedattn
