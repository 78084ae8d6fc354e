// Dropout by Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):
// the key is the seed, the counter (column / 4, row), and word column % 4 decides.
#pragma once

#include "common.cuh"

namespace fusedattn::cuda {

// The words of the counter (a, b, c, d).
FUSEDATTN_DEVICE Pack<uint32_t, 4> philox(uint64_t key, uint32_t a, uint32_t b, uint32_t c,
                                          uint32_t d) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(0xD2511F53u) * a, second = uint64_t(0xCD9E8D57u) * c;
    a = uint32_t(second >> 32) ^ b ^ k0;
    c = uint32_t(first >> 32) ^ d ^ k1;
    b = uint32_t(second);
    d = uint32_t(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

FUSEDATTN_DEVICE Pack<uint32_t, 4> philox(uint64_t key, uint64_t row, uint32_t quad) {
  return philox(key, quad, uint32_t(row), uint32_t(row >> 32), 0);
}

struct Dropout {
  const int64_t* seed = nullptr;  // absent: nothing is dropped
  uint64_t threshold = 0;         // words below it drop their element
  float scale = 1.0f;             // of what is kept

  // x at (row, column …): both the forward and, on the gradient, the backward.
  template <int N>
  FUSEDATTN_DEVICE void apply(Pack<float, N>& x, uint64_t key, int64_t row, int64_t column) const {
    const auto one = [&](float value, uint32_t word) {
      return word >= threshold ? value * scale : 0.0f;
    };
    if constexpr (N == 1) {
      const Pack<uint32_t, 4> words = philox(key, uint64_t(row), uint32_t(column / 4));
      const uint32_t low = column & 1 ? words[1] : words[0];
      const uint32_t high = column & 1 ? words[3] : words[2];
      x[0] = one(x[0], column & 2 ? high : low);
    } else {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const auto words = philox(key, uint64_t(row), uint32_t((column + i) / 4));
#pragma unroll
        for (int j = 0; j < 4; ++j) x[i + j] = one(x[i + j], words[j]);
      }
    }
  }
};

inline Dropout dropout(const TensorView& seed, double p) {
  if (!seed) return {};
  return {static_cast<const int64_t*>(seed.data), uint64_t(p * 4294967296.0),
          p < 1.0 ? float(1.0 / (1.0 - p)) : 0.0f};
}

}  // namespace fusedattn::cuda
