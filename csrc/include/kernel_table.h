// The kernels of one op in one instruction set, by the parameters they take and by dtype.
#pragma once

#include "tensor_view.h"

namespace fusedattn {

// A kernel returns false for numbers that it cannot take. Below `least_work`, in the unit of
// Params::work(), a simpler instruction set is faster.
template <class Params>
struct Kernel {
  bool (*run)(const Params&) = nullptr;
  int64_t least_work = 0;
};

// One entry per Params::dtype. Where it is absent or does not take the call, a simpler set serves.
template <class Params>
struct Table {
  Kernel<Params> by_dtype[float_dtypes];

  const Kernel<Params>& of(const Params& params) const { return by_dtype[int(params.dtype())]; }
};

// kernel_for<NormForward>(kernels, DType::f32) = {norm_forward<float>};
template <class Params>
FUSEDATTN_MEMBER inline Kernel<Params>& kernel_for(Table<Params>& table, DType dtype) {
  return table.by_dtype[int(dtype)];
}

template <class... Params>
struct KernelTable : Table<Params>... {
  using Table<Params>::of...;
};

}  // namespace fusedattn
