// Dropout's mask as a function of the seed and an element's place: Philox-4x32-10 (Salmon et al.
// 2011).
#pragma once

#include "vec.h"

namespace fusedattn::FUSEDATTN_ISA {

constexpr int philox_rounds = 10;

// Each element has a random word in [0, 2³²); those below probability · 2³² are dropped and what is
// kept is multiplied by 1 / (1 − probability).
struct Dropout {
  uint64_t low[philox_rounds] = {}, high[philox_rounds] = {};  // halves of the key of each round
  uint64_t threshold = 0;
  double factor = 1;

  Dropout() = default;
  FUSEDATTN_MEMBER Dropout(const TensorView& seed_tensor, double probability)
      : threshold(uint64_t(probability * 0x1p32)),
        factor(probability < 1 ? 1 / (1 - probability) : 0) {
    const uint64_t seed = *static_cast<const uint64_t*>(seed_tensor.data);
    for (uint32_t i = 0; i < philox_rounds; ++i) {
      low[i] = uint32_t(seed) + i * 0x9E3779B9;
      high[i] = uint32_t(seed >> 32) + i * 0xBB67AE85;
    }
  }

  FUSEDATTN_MEMBER explicit operator bool() const { return threshold != 0; }
};

// A counter's words, one counter to a lane; the high half of a lane is not looked at.
typedef uint64_t words __attribute__((vector_size(vector_bytes)));

constexpr int counters = 2;  // vectors of them under way at once, as multiplications take a while
constexpr int dropout_step =
    counters * 4 * width<double>;  // columns whose words are drawn together

FUSEDATTN_INLINE words product(words x, uint32_t y) {
#if defined(__AVX512F__)
  return (words)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(y));
#elif defined(__AVX2__)
  return (words)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(y));
#else
  return (x & 0xffffffff) * uint64_t{y};
#endif
}

// All bits of the halves of lanes that, as unsigned numbers, are above a limit; 2³¹ less is given.
FUSEDATTN_INLINE words above(words low, words high, int32_t limit) {
  const words both = (low & 0xffffffff) | high << 32;
  return (words)(((ints<float>)both ^ int32_t(0x80000000)) > limit);
}

// What stands in the counter behind column / 4: where a row of elements is.
struct RowCounter {
  uint32_t second, third, fourth;
};

// keep[j] = whether column + j of a row survives, for j < n rounded up to dropout_step; `column` is
// a multiple of 4 and the probability is not 0. Counter (column / 4, row), key (seed low, seed
// high); of the counter's four words, column takes number column % 4.
static void keep_mask(const Dropout& d, RowCounter row, int64_t column, int64_t n, uint8_t* keep) {
  typedef uint32_t bytes __attribute__((vector_size(4 * width<double>)));
  const int32_t limit = int32_t(uint32_t(d.threshold - 1) ^ 0x80000000);
  words lane;
  for (int i = 0; i < width<double>; ++i) lane[i] = i;
  for (int64_t j = 0; j < n; j += dropout_step) {
    words a[counters], b[counters], c[counters], e[counters];
#pragma GCC unroll 2
    for (int g = 0; g < counters; ++g) {
      a[g] = lane + (uint64_t(column + j) / 4 + g * width<double>);
      b[g] = words{} + row.second;
      c[g] = words{} + row.third;
      e[g] = words{} + row.fourth;
    }
#pragma GCC unroll 10
    for (int round = 0; round < philox_rounds; ++round) {
#pragma GCC unroll 2
      for (int g = 0; g < counters; ++g) {
        const words x = product(a[g], 0xD2511F53), y = product(c[g], 0xCD9E8D57);
        a[g] = (y >> 32) ^ (b[g] ^ d.low[round]);
        b[g] = y;
        c[g] = (x >> 32) ^ (e[g] ^ d.high[round]);
        e[g] = x;
      }
    }
#pragma GCC unroll 2
    for (int g = 0; g < counters; ++g) {
      const words first = above(a[g], b[g], limit) & 0x0000010000000001;
      const words last = above(c[g], e[g], limit) & 0x0100000000010000;
      const words found = first | last;
      const bytes packed = __builtin_convertvector(found | found >> 32, bytes);
      memcpy(keep + j + g * 4 * width<double>, &packed, sizeof packed);
    }
  }
}

// The same for row `row` of a matrix: (row low, row high, 0).
static inline void keep_mask(const Dropout& d, int64_t row, int64_t column, int64_t n,
                             uint8_t* keep) {
  keep_mask(d, RowCounter{uint32_t(row), uint32_t(uint64_t(row) >> 32), 0}, column, n, keep);
}

}  // namespace fusedattn::FUSEDATTN_ISA
