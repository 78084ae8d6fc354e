// The attention kernels of one instruction set, by dtype.
#pragma once

#include "attention_backward.h"
#include "attention_bias_grad.h"
#include "attention_forward.h"
#include "attention_jvp.h"
#include "dtypes.h"

namespace fusedattn::FUSEDATTN_ISA {

template <class E, class T>
static bool attention_gradients(const AttentionBackward& f) {
  bool bias_done = false;
  if (!attention_backward<E, T>(f, bias_done)) return false;
  if (f.dbias && !bias_done) attention_bias_grad<E, T>(f, f.dbias, false);
  if (f.dalibi_slopes) attention_bias_grad<E, T>(f, f.dalibi_slopes, true);
  return true;
}

template <class E, class T>
static void add(AttentionKernels& kernels, DType dtype, int64_t least_forward = 0,
                int64_t least_backward = 0) {
  kernel_for<AttentionForward>(kernels, dtype) = {attention_forward<E, T>, least_forward};
  kernel_for<AttentionBackward>(kernels, dtype) = {attention_gradients<E, T>, least_backward};
}

template <class E, class T>
static void add(AttentionJvpKernels& kernels, DType dtype, int64_t least = 0) {
  kernel_for<AttentionJvp>(kernels, dtype) = {attention_jvp<E, T>, least};
}

template <class Kernels>
static inline Kernels fma_kernels() {
  return by_dtype<Kernels>(
      []<class T>(Kernels& kernels, DType dtype) { add<Fma<compute_t<T>>, T>(kernels, dtype); });
}

}  // namespace fusedattn::FUSEDATTN_ISA
