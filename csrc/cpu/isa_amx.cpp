#define FUSEDATTN_ISA amx
#include "amx.h"
#include "attention_kernels.h"

namespace fusedattn {

AttentionKernels attention_kernels_amx() {
  AttentionKernels kernels;
  kernels.least_scores = 256;  // one tile: less leaves most of it empty
  amx::add<amx::Amx<1>, amx::bf16>(kernels, DType::bf16);
  amx::add<amx::Amx<2>, amx::f16>(kernels, DType::f16);
  amx::add<amx::Amx<3>, float>(kernels, DType::f32);
  return kernels;
}

}  // namespace fusedattn
