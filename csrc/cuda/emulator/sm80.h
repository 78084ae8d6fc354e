// The names of sm80/instructions.cuh on the host emulator, from the PTX ISA's tables of fragments.
#pragma once

#include "cuda/attention_schedule.h"
#include "cuda/common.cuh"

namespace fusedattn::emulator {

// What a lane brings to an ldmatrix: a row of one of the four matrices of 8 × 8.
struct MatrixRow {
  uint16_t values[8];
};

// What a lane brings to an mma.m16n8k16: its part of A (16 × 16), B (16 × 8) and C (16 × 8). It
// takes away its part of C + A B.
struct MmaPart {
  uint32_t a[4];
  uint32_t b[2];
  float c[4];
};

SlotWork multiply_f16, multiply_bf16;  // 32 of MmaPart

}  // namespace fusedattn::emulator

namespace fusedattn::cuda {

// --- asynchronous copies -------------------------------------------------------------------------

FUSEDATTN_DEVICE void copy_async(void* to_shared, const void* from_global, bool exists,
                                 Where where = Where::current()) {
  using emulator::Flaw, emulator::Landing;
  Landing landing = exists ? Landing::data : Landing::zeros;
  if (!exists && emulator::flawed(Flaw::copies_anyway, where)) landing = Landing::data;
  if (!exists && emulator::flawed(Flaw::no_zeros, where)) landing = Landing::garbage;
  emulator::copy_async(emulator::swizzled(to_shared, where), from_global, landing);
}

inline void commit_copies(Where where = Where::current()) {
  if (!emulator::flawed(emulator::Flaw::no_commit, where)) emulator::commit_copies();
}

template <int n>
void wait_copies(Where where = Where::current()) {
  static_assert(n >= 0);
  if (emulator::flawed(emulator::Flaw::no_wait, where)) return;
  emulator::wait_copies(n + emulator::flawed(emulator::Flaw::wait_for_one_less, where));
}

// --- matrices ------------------------------------------------------------------------------------

namespace machine {

FUSEDATTN_DEVICE const emulator::MatrixRow* exchange_rows(const void* row, const char* what,
                                                          const Where& where) {
  row = emulator::swizzled(row, where);
  emulator::note(row, sizeof(emulator::MatrixRow), Space::shared, emulator::Access::load);
  const void* all = emulator::exchange(row, sizeof(emulator::MatrixRow), nullptr, what, where);
  return static_cast<const emulator::MatrixRow*>(all);
}

}  // namespace machine

// Lane 8 i + r brings row r of matrix i. Of each matrix lane l gets the elements (l / 4, 2 (l % 4))
// and (l / 4, 2 (l % 4) + 1).
FUSEDATTN_DEVICE Pack<uint32_t, 4> load_matrices(const void* row, Where where = Where::current()) {
  const emulator::MatrixRow* rows = machine::exchange_rows(row, "load_matrices()", where);
  const int i = lane() / 4, j = lane() % 4 * 2;
  Pack<uint32_t, 4> result;
  for (int m = 0; m < 4; ++m) {
    const uint16_t* values = rows[8 * m + i].values;
    result[m] = values[j] | uint32_t(values[j + 1]) << 16;
  }
  return result;
}

// The same of the transposed matrices.
FUSEDATTN_DEVICE Pack<uint32_t, 4> load_matrices_transposed(const void* row,
                                                            Where where = Where::current()) {
  const emulator::MatrixRow* rows =
      machine::exchange_rows(row, "load_matrices_transposed()", where);
  const int i = lane() / 4, j = lane() % 4 * 2;
  Pack<uint32_t, 4> result;
  for (int m = 0; m < 4; ++m)
    result[m] = rows[8 * m + j].values[i] | uint32_t(rows[8 * m + j + 1].values[i]) << 16;
  return result;
}

template <class T>
void mma(Pack<float, 4>& c, const Pack<uint32_t, 4>& a, uint32_t b_low, uint32_t b_high,
         Where where = Where::current()) {
  static_assert(std::is_same_v<T, f16> || std::is_same_v<T, bf16>);
  constexpr bool is_f16 = std::is_same_v<T, f16>;
  const emulator::MmaPart part = {
      {a[0], a[1], a[2], a[3]}, {b_low, b_high}, {c[0], c[1], c[2], c[3]}};
  const void* all = emulator::exchange(&part, sizeof part,
                                       is_f16 ? emulator::multiply_f16 : emulator::multiply_bf16,
                                       is_f16 ? "mma<f16>()" : "mma<bf16>()", where);
  std::memcpy(&c, static_cast<const emulator::MmaPart*>(all)[lane()].c, sizeof c);
}

template <class T>
uint32_t pair(float low, float high) {
  static_assert(std::is_same_v<T, f16> || std::is_same_v<T, bf16>);
  return std::is_same_v<T, f16> ? machine::to_f16_pair(low, high)
                                : machine::to_bf16_pair(low, high);
}

}  // namespace fusedattn::cuda

// The kernels ask for their tiles in the words of attention_schedule.h.
#define key_tiles(...) \
  ::fusedattn::emulator::visited(key_tiles(__VA_ARGS__), std::source_location::current())
#define query_tiles(...) \
  ::fusedattn::emulator::visited(query_tiles(__VA_ARGS__), std::source_location::current())
