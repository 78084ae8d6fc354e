// setup.py compiles this file once for each FUSEDATTN_ELEMENT and FUSEDATTN_HEAD_DIM.
#include "attention_forward.cuh"

namespace fusedattn::cuda {

template void launch_attention_forward<FUSEDATTN_ELEMENT, FUSEDATTN_HEAD_DIM>(
    const AttentionForward&, Stream);

}  // namespace fusedattn::cuda
