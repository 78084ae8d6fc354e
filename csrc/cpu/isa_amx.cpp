#define FUSEDATTN_ISA amx
#include "amx.h"
#include "attention_kernels.h"

namespace fusedattn::FUSEDATTN_ISA {

// Less than a tile leaves most of it empty; fp32 also has to earn its splitting (measured).
constexpr int64_t tile = 16 * 16, earned_forward = 100 * 100, earned = 255 * 255;

AttentionKernels attention_kernels() {
  AttentionKernels kernels;
  add<Amx<1>, bf16>(kernels, DType::bf16, tile, tile);
  add<Amx<2>, f16>(kernels, DType::f16, tile, tile);
  add<Amx<3>, float>(kernels, DType::f32, earned_forward, earned);
  return kernels;
}

AttentionJvpKernels attention_jvp_kernels() {
  AttentionJvpKernels kernels;
  add<Amx<1>, bf16>(kernels, DType::bf16, tile);
  add<Amx<2>, f16>(kernels, DType::f16, tile);
  add<Amx<3>, float>(kernels, DType::f32, earned_forward);
  return kernels;
}

}  // namespace fusedattn::FUSEDATTN_ISA
