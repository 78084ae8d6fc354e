// What sm_80 and later GPUs have beside common.cuh: copies that run on their own, and matrix
// products of a warp. "PTX" is the PTX ISA manual; what stands after it is the section.
//
//   copy_async(to, from, exists) commit_copies() wait_copies<n>()   global to shared memory
//   load_matrices(row) load_matrices_transposed(row)                fragments from shared memory
//   mma<T>(c, a, b_low, b_high)                                     c += a b
//   pair<T>(low, high)                                              two floats, rounded
//
// Fragments of mma.m16n8k16, as each lane holds them; g = lane / 4, t = lane % 4, and a register of
// a and b holds two elements, the one at 2t in its low half (PTX: Matrix Fragments for
// mma.m16n8k16 with floating point type):
//
//   a, 16 × 16   [0]        row g,      k 2t and 2t + 1
//                [1]        row g + 8,  k 2t and 2t + 1
//                [2]        row g,      k 2t + 8 and 2t + 9
//                [3]        row g + 8,  k 2t + 8 and 2t + 9
//   b, 16 × 8    low        k 2t and 2t + 1,      column g
//                high       k 2t + 8 and 2t + 9,  column g
//   c, 16 × 8    [0] [1]    row g,      columns 2t and 2t + 1
//                [2] [3]    row g + 8,  columns 2t and 2t + 1
#pragma once

#include "cuda/common.cuh"

#ifdef FUSEDATTN_EMULATED
#include "cuda/emulator/sm80.h"
#else

namespace fusedattn::cuda {

namespace machine {

// PTX: State Spaces, .shared; an address there has 32 bits.
FUSEDATTN_DEVICE uint32_t shared_address(const void* at) {
  return uint32_t(__cvta_generic_to_shared(at));
}

}  // namespace machine

// PTX: cp.async. 16 bytes, past the first-level cache; what is next to them comes to the second
// level as well. Where not `exists`, nothing is read and zeros land.
FUSEDATTN_DEVICE void copy_async(void* to_shared, const void* from_global, bool exists) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   machine::shared_address(to_shared)),
               "l"(__cvta_generic_to_global(from_global)), "r"(exists ? 16 : 0)
               : "memory");
}

// PTX: cp.async.commit_group. What this thread has begun to copy since the last one is a group.
FUSEDATTN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// PTX: cp.async.wait_group. All groups of this thread have landed but the newest n; a barrier then
// shows them to other threads.
template <int n>
FUSEDATTN_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// PTX: ldmatrix. Four 8 × 8 matrices of 16-bit elements: lane i gives the address of row i % 8, 16
// bytes, of matrix i / 8. Of each matrix it gets elements 2t and 2t + 1 of row g.
FUSEDATTN_DEVICE Pack<uint32_t, 4> load_matrices(const void* row) {
  Pack<uint32_t, 4> x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(machine::shared_address(row))
               : "memory");
  return x;
}

// PTX: ldmatrix, .trans. Of each matrix it gets rows 2t and 2t + 1 of column g.
FUSEDATTN_DEVICE Pack<uint32_t, 4> load_matrices_transposed(const void* row) {
  Pack<uint32_t, 4> x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(machine::shared_address(row))
               : "memory");
  return x;
}

// PTX: mma.m16n8k16 (Multiply-and-Accumulate Instruction: mma).
template <class T>
FUSEDATTN_DEVICE void mma(Pack<float, 4>& c, const Pack<uint32_t, 4>& a, uint32_t b_low,
                          uint32_t b_high) {
  static_assert(std::is_same_v<T, f16> || std::is_same_v<T, bf16>);
  if constexpr (std::is_same_v<T, f16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// PTX: cvt.rn.f16x2.f32, cvt.rn.bf16x2.f32. To nearest, ties to even.
template <class T>
FUSEDATTN_DEVICE uint32_t pair(float low, float high) {
  if constexpr (std::is_same_v<T, f16>)
    return machine::to_f16_pair(low, high);
  else
    return machine::to_bf16_pair(low, high);
}

}  // namespace fusedattn::cuda

#endif  // FUSEDATTN_EMULATED
