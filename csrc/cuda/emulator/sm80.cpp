// The arithmetic of mma.sync.m16n8k16 (PTX: Matrix Fragments for mma.m16n8k16 with floating point
// type).
#include "sm80.h"

namespace fusedattn::emulator {
namespace {

// Four columns at a time, as every x86-64 and AArch64 processor can.
typedef float Columns __attribute__((vector_size(16)));

float low(uint32_t pair, cuda::f16) { return cuda::machine::from_f16(uint16_t(pair)); }
float low(uint32_t pair, cuda::bf16) { return cuda::machine::from_bf16(uint16_t(pair)); }

// Products of 16-bit numbers are exact in float; they are added one after the other, k = 0 … 15,
// each sum rounded to nearest. A GPU adds in another order and may truncate: what holds under the
// tolerance rule does not depend on it.
template <class T>
void multiply(void* slots) {
  MmaPart* parts = static_cast<MmaPart*>(slots);
  alignas(16) float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaPart& part = parts[lane];
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      const int shift = 16 * half, at = pair + half;
      a[group][at] = low(part.a[0] >> shift, T());
      a[group + 8][at] = low(part.a[1] >> shift, T());
      a[group][at + 8] = low(part.a[2] >> shift, T());
      a[group + 8][at + 8] = low(part.a[3] >> shift, T());
      b[at][group] = low(part.b[0] >> shift, T());
      b[at + 8][group] = low(part.b[1] >> shift, T());
      c[group][at] = part.c[half];
      c[group + 8][at] = part.c[2 + half];
    }
  }
  for (int i = 0; i < 16; ++i) {
    Columns left, right;
    std::memcpy(&left, c[i], sizeof left);
    std::memcpy(&right, c[i] + 4, sizeof right);
    for (int k = 0; k < 16; ++k) {
      Columns row[2];
      std::memcpy(row, b[k], sizeof row);
      left += a[i][k] * row[0];
      right += a[i][k] * row[1];
    }
    std::memcpy(c[i], &left, sizeof left);
    std::memcpy(c[i] + 4, &right, sizeof right);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    std::memcpy(parts[lane].c, &c[group][pair], 8);
    std::memcpy(parts[lane].c + 2, &c[group + 8][pair], 8);
  }
}

}  // namespace

void multiply_f16(void* parts) { multiply<cuda::f16>(parts); }
void multiply_bf16(void* parts) { multiply<cuda::bf16>(parts); }

}  // namespace fusedattn::emulator
