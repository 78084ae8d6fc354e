// Dropout's mask as a function of (seed, row, column): Philox-4x32-10 (Salmon et al. 2011).
#pragma once

#include "vec.h"

namespace fusedattn::FUSEDATTN_ISA {

// Each element has a random word in [0, 2³²); those below probability · 2³² are dropped and what is
// kept is multiplied by 1 / (1 − probability).
struct Dropout {
  uint64_t seed = 0;
  uint64_t threshold = 0;
  double factor = 1;

  Dropout() = default;
  FUSEDATTN_MEMBER Dropout(const TensorView& seed_tensor, double probability)
      : seed(*static_cast<const uint64_t*>(seed_tensor.data)),
        threshold(uint64_t(probability * 0x1p32)),
        factor(probability < 1 ? 1 / (1 - probability) : 0) {}

  FUSEDATTN_MEMBER explicit operator bool() const { return threshold != 0; }
};

constexpr int dropout_step = 4 * width<double>;  // columns whose words are drawn together

// A counter's words, one counter to a lane; the high half of a lane is not looked at.
typedef uint64_t words __attribute__((vector_size(vector_bytes)));

FUSEDATTN_INLINE words product(words x, uint32_t y) {
#if defined(__AVX512F__)
  return (words)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(y));
#elif defined(__AVX2__)
  return (words)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(y));
#else
  return (x & 0xffffffff) * uint64_t{y};
#endif
}

// keep[j] = whether column + j of `row` survives, for j < n rounded up to dropout_step; `column` is
// a multiple of 4. Counter (column / 4, row low, row high, 0), key (seed low, seed high); of the
// counter's four words, column takes number column % 4.
static void keep_mask(const Dropout& d, int64_t row, int64_t column, int64_t n, uint8_t* keep) {
  constexpr int lanes = dropout_step / 4;
  typedef uint32_t bytes __attribute__((vector_size(4 * lanes)));
  words lane;
  for (int i = 0; i < lanes; ++i) lane[i] = i;
  for (int64_t j = 0; j < n; j += dropout_step) {
    words a = lane + uint64_t(column + j) / 4, b = words{} + uint64_t(row),
          c = words{} + (uint64_t(row) >> 32), e{};
    uint32_t low = uint32_t(d.seed), high = uint32_t(d.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const words x = product(a, 0xD2511F53), y = product(c, 0xCD9E8D57);
      a = (y >> 32) ^ b ^ low;
      b = y;
      c = (x >> 32) ^ e ^ high;
      e = x;
      low += 0x9E3779B9;
      high += 0xBB67AE85;
    }
    const auto kept = [&](words word, int byte) {
      return (words)((word & 0xffffffff) >= d.threshold) & uint64_t{1} << 8 * byte;
    };
    const bytes packed =
        __builtin_convertvector(kept(a, 0) | kept(b, 1) | kept(c, 2) | kept(e, 3), bytes);
    memcpy(keep + j, &packed, sizeof packed);
  }
}

}  // namespace fusedattn::FUSEDATTN_ISA
