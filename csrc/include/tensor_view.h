// A tensor as the kernels see it: a pointer, a shape, strides and a dtype. No framework.
#pragma once

#include <cstdint>

// Members are compiled once per instruction set: inlined always, they never become a symbol that
// the linker could share between them. CUDA kernels call them too.
#ifdef __CUDACC__
#define FUSEDATTN_MEMBER __host__ __device__ __attribute__((always_inline))
#else
#define FUSEDATTN_MEMBER __attribute__((always_inline))
#endif

namespace fusedattn {

enum class DType : int { f16, bf16, f32, f64, boolean, i32, i64 };

constexpr int float_dtypes = 4;  // the first four are what ops compute in

FUSEDATTN_MEMBER constexpr int64_t bytes_of(DType dtype) {
  constexpr int64_t bytes[] = {2, 2, 4, 8, 1, 4, 8};
  return bytes[int(dtype)];
}

// A CUDA stream as an integer; 0 on a CPU.
using Stream = uintptr_t;

// Up to four dimensions; strides in elements, 0 where the tensor is broadcast.
struct TensorView {
  void* data = nullptr;
  int64_t shape[4] = {1, 1, 1, 1};
  int64_t stride[4] = {0, 0, 0, 0};
  DType dtype = DType::f32;
  int32_t device = absent;  // which GPU; 0 on a CPU

  static constexpr int32_t absent = -1;

  // Whether there is a tensor. One without elements may have no data.
  FUSEDATTN_MEMBER explicit operator bool() const { return device != absent; }

  // The element at (b, h, i, j), in elements from data.
  FUSEDATTN_MEMBER int64_t offset(int64_t b, int64_t h, int64_t i = 0, int64_t j = 0) const {
    return b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3];
  }

  // The integer at `at` elements from data, of int32 or int64.
  FUSEDATTN_MEMBER int64_t integer(int64_t at) const {
    return dtype == DType::i32 ? static_cast<const int32_t*>(data)[at]
                               : static_cast<const int64_t*>(data)[at];
  }

  template <class T>
  FUSEDATTN_MEMBER T* at(int64_t b, int64_t h, int64_t i = 0, int64_t j = 0) const {
    return static_cast<T*>(data) + offset(b, h, i, j);
  }
};

}  // namespace fusedattn
