// Which dtypes an instruction set has kernels for, and the table of an op's kernels by dtype.
#pragma once

#include "kernel_table.h"
#include "vec.h"

namespace fusedattn::FUSEDATTN_ISA {

template <class T>
constexpr DType dtype_of = DType::f32;
template <>
constexpr DType dtype_of<double> = DType::f64;
template <>
constexpr DType dtype_of<f16> = DType::f16;
template <>
constexpr DType dtype_of<bf16> = DType::bf16;

// Whether a set has kernels of its own for a dtype: to AVX-512, AVX-512-BF16 adds those of bf16.
#if defined(__AVX512BF16__)
template <class T>
constexpr bool served = std::is_same_v<T, bf16>;
#else
template <class T>
constexpr bool served = true;
#endif

// The table that add(kernels, dtype), called with each type that is served, has filled.
template <class Kernels, class Add>
FUSEDATTN_INLINE Kernels by_dtype(Add add) {
  Kernels kernels;
  const auto add_of = [&]<class T>(T) {
    if constexpr (served<T>) add.template operator()<T>(kernels, dtype_of<T>);
  };
  add_of(f16{});
  add_of(bf16{});
  add_of(float{});
  add_of(double{});
  return kernels;
}

}  // namespace fusedattn::FUSEDATTN_ISA
