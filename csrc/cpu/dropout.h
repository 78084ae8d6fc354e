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

constexpr int dropout_step = 64;  // columns whose words are drawn together

// keep[j] = whether column + j of `row` survives, for j < n rounded up to dropout_step; `column` is
// a multiple of 4. Counter (column / 4, row low, row high, 0), key (seed low, seed high); of the
// counter's four words, column takes number column % 4.
static void keep_mask(const Dropout& d, int64_t row, int64_t column, int64_t n, uint8_t* keep) {
  constexpr int lanes = dropout_step / 4;
  for (int64_t j = 0; j < n; j += dropout_step) {
    uint32_t a[lanes], b[lanes], c[lanes], e[lanes];
    for (int i = 0; i < lanes; ++i) {
      a[i] = uint32_t((column + j) / 4 + i);
      b[i] = uint32_t(row);
      c[i] = uint32_t(row >> 32);
      e[i] = 0;
    }
    uint32_t low = uint32_t(d.seed), high = uint32_t(d.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < lanes; ++i) {
        const uint64_t x = uint64_t{0xD2511F53} * a[i], y = uint64_t{0xCD9E8D57} * c[i];
        a[i] = uint32_t(y >> 32) ^ b[i] ^ low;
        b[i] = uint32_t(y);
        c[i] = uint32_t(x >> 32) ^ e[i] ^ high;
        e[i] = uint32_t(x);
      }
      low += 0x9E3779B9;
      high += 0xBB67AE85;
    }
    for (int i = 0; i < lanes; ++i) {
      keep[j + 4 * i] = a[i] >= d.threshold;
      keep[j + 4 * i + 1] = b[i] >= d.threshold;
      keep[j + 4 * i + 2] = c[i] >= d.threshold;
      keep[j + 4 * i + 3] = e[i] >= d.threshold;
    }
  }
}

}  // namespace fusedattn::FUSEDATTN_ISA
