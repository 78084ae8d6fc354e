#define FUSEDATTN_ISA amx
#include "amx.h"
#include "attention_kernels.h"

namespace fusedattn::FUSEDATTN_ISA {

AttentionKernels attention_kernels() {
  // Less than a tile leaves most of it empty; fp32 also has to earn its splitting (measured).
  constexpr int64_t tile = 16 * 16, earned = 255 * 255;
  AttentionKernels kernels;
  add<Amx<1>, bf16>(kernels, DType::bf16, tile, tile);
  add<Amx<2>, f16>(kernels, DType::f16, tile, tile);
  add<Amx<3>, float>(kernels, DType::f32, 100 * 100, earned);
  return kernels;
}

}  // namespace fusedattn::FUSEDATTN_ISA
