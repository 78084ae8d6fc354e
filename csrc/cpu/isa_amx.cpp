#define FUSEDATTN_ISA amx
#include "amx.h"
#include "attention_kernels.h"

namespace fusedattn {

AttentionKernels attention_kernels_amx() {
  // Less than a tile leaves most of it empty; fp32 also has to earn its splitting (measured).
  constexpr int64_t tile = 16 * 16, earned = 255 * 255;
  AttentionKernels kernels;
  amx::add<amx::Amx<1>, amx::bf16>(kernels, DType::bf16, tile, tile);
  amx::add<amx::Amx<2>, amx::f16>(kernels, DType::f16, tile, tile);
  amx::add<amx::Amx<3>, float>(kernels, DType::f32, 100 * 100, earned);
  return kernels;
}

}  // namespace fusedattn
