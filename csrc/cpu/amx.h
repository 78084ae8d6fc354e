// Products on AMX tiles: bf16 directly, fp16 and fp32 as sums of bf16 parts.
//
// A number is split into `Planes` bf16 parts, most significant first: fp16 is exactly two, fp32
// exactly three. Of the products of parts i and j those with i + j < Planes are kept, so what is
// dropped is below 2^-16 (fp16) and 2^-22 (fp32) of a product; sums are fp32 in the tile unit
// (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for
// higher-precision computations", 2019). Six passes at sixteen times the rate of fp32 FMA.
#pragma once

#include "bf16_dot.h"

namespace fusedattn::FUSEDATTN_ISA {

// The layout of LDTILECFG's operand (Intel SDM, volume 1, chapter 18).
struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// All eight tiles as 16 rows of 64 bytes, for as long as this lives on a thread.
struct TileScope {
  FUSEDATTN_MEMBER TileScope() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    // The intrinsic tells the compiler of eight bytes only: without this, it drops the stores.
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  FUSEDATTN_MEMBER ~TileScope() { _tile_release(); }
};

// 32 × 32 of C (or 16 × 32 where `Tall` is false): four tiles of sums, two of A, two of B, so that
// each tile loaded is used twice.
// `tick` is called after every four products.
template <int Planes, bool Tall, class Tick>
FUSEDATTN_INLINE void multiply_tiles(int64_t depth, Rows<uint32_t> a, const uint32_t* b,
                                     int64_t plane_b, float* c, int64_t ldc, bool accumulate,
                                     Tick& tick) {
  constexpr int panel_bytes = 32 * 4;
  if (accumulate) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + 16, ldc * 4);
    if (Tall) _tile_loadd(2, c + 16 * ldc, ldc * 4);
    if (Tall) _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (Tall) _tile_zero(2);
    if (Tall) _tile_zero(3);
  }
  // All products of one step along k before the next: its parts are then still in L1.
  for (int64_t k = 0; k < depth; k += 16) {
#pragma GCC unroll 3
    for (int p = 0; p < Planes; ++p) {
      const uint32_t* row = a.data + p * a.plane + k;
      _tile_loadd(4, row, a.ld * 4);
      if (Tall) _tile_loadd(5, row + 16 * a.ld, a.ld * 4);
#pragma GCC unroll 3
      for (int o = 0; o < Planes - p; ++o) {
        const uint32_t* column = b + o * plane_b + k * 32;
        _tile_loadd(6, column, panel_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, column + 16, panel_bytes);
        _tile_dpbf16ps(1, 4, 7);
        if (Tall) _tile_dpbf16ps(2, 5, 6);
        if (Tall) _tile_dpbf16ps(3, 5, 7);
        tick();
      }
    }
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16, ldc * 4);
  if (Tall) _tile_stored(2, c + 16 * ldc, ldc * 4);
  if (Tall) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

template <int Planes>
struct Amx {
  typedef float Stat;
  typedef uint32_t Unit;
  typedef TileScope Scope;
  static constexpr int planes = Planes;
  static constexpr int per_unit = 2;
  static constexpr int depth_step = 32;
  static constexpr int row_step = 16;
  static constexpr int panel = 32;
  static constexpr bool overlaps = true;
  static constexpr int exp2_degree = Planes == 1 ? 4 : 6;

  // The part of x that bf16 holds, rounded towards zero so that it cannot overflow.
  FUSEDATTN_INLINE vec<float> leading(vec<float> x) {
    return (vec<float>)((ints<float>)x & int32_t(0xffff0000));
  }

  template <class Put>
  FUSEDATTN_INLINE void split(vec<float> x, vec<float> y, Put put) {
#pragma GCC unroll 4
    for (int p = 0; p + 1 < Planes; ++p) {
      const vec<float> hx = leading(x), hy = leading(y);
      put(p, to_bf16(hx, hy));
      x -= hx;
      y -= hy;
    }
    put(Planes - 1, to_bf16(x, y));
  }

  FUSEDATTN_INLINE void put_along(Rows<Unit> a, int64_t i, int64_t j, vec<float> x, vec<float> y) {
    Unit* row = a.data + i * a.ld + j / 2;
    split(x, y, [&](int p, __m512i parts) { _mm512_storeu_si512(row + p * a.plane, parts); });
  }

  FUSEDATTN_INLINE void put_across(Panels<Unit> b, int64_t k, int64_t j, vec<float> x,
                                   vec<float> y) {
    Unit* row = b.data + (j / panel * b.depth + k / 2) * panel + j % panel;
    split(x, y,
          [&](int p, __m512i parts) { _mm512_storeu_si512(row + p * b.plane, interleave(parts)); });
  }

  // Rows of A and C in whole multiples of 16, columns of 32, k of 32.
  static void multiply(int64_t m, int64_t n, int64_t k, Rows<Unit> a, Panels<Unit> b, float* c,
                       int64_t ldc, bool accumulate) {
    const auto nothing = [] {};
    multiply_beside(m, n, k, a, b, c, ldc, accumulate, nothing);
  }

  // The tile unit works on its own once it is fed: vector instructions of `tick`, called
  // `ticks(m, n, k)` times, run in its shadow.
  template <class Tick>
  FUSEDATTN_INLINE void multiply_beside(int64_t m, int64_t n, int64_t k, Rows<Unit> a,
                                        Panels<Unit> b, float* c, int64_t ldc, bool accumulate,
                                        Tick& tick) {
    // The tile intrinsics do not tell the compiler that they touch memory.
    asm volatile("" ::: "memory");
    for (int64_t j = 0; j < n; j += panel) {
      const Unit* columns = b.data + j * b.depth;
      int64_t i = 0;
      for (; i + 16 < m; i += 32)
        multiply_tiles<Planes, true>(k / 2, a.from(i), columns, b.plane, c + i * ldc + j, ldc,
                                     accumulate, tick);
      if (i < m)
        multiply_tiles<Planes, false>(k / 2, a.from(i), columns, b.plane, c + i * ldc + j, ldc,
                                      accumulate, tick);
    }
    asm volatile("" ::: "memory");
  }

  static int64_t ticks(int64_t m, int64_t n, int64_t k) {
    return (m + 31) / 32 * ((n + panel - 1) / panel) * (k / 32) * (Planes * (Planes + 1) / 2);
  }
};

}  // namespace fusedattn::FUSEDATTN_ISA
