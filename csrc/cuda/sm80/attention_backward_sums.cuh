// In which order the sums of dQ lie in the workspace: attention_backward_keys adds to them, and
// attention_backward_round reads them, as fragments of a product. The 128 sums of a fragment: the
// four of a lane side by side where one instruction adds them, else one of each lane.
#pragma once

#include "attention_config.h"

namespace fusedattn::cuda {

template <int head_dim, KeysShape shape>
struct DqFragments {
  static constexpr int threads = shape.warps * warp_size;
  static constexpr bool divides(int row_warps) {
    return shape.queries % (16 * row_warps) == 0 && shape.warps % row_warps == 0 &&
           head_dim % (16 * (shape.warps / row_warps)) == 0;
  }
  // 32 rows of a warp where that goes
  static constexpr int row_warps =
      divides(shape.queries / 32) ? shape.queries / 32 : shape.queries / 16;
  static_assert(divides(row_warps));
  static constexpr int column_warps = shape.warps / row_warps;
  static constexpr int m = shape.queries / row_warps / 16, n = head_dim / column_warps / 8;

  FUSEDATTN_DEVICE static int row() { return warp() / column_warps * 16 * m; }
  FUSEDATTN_DEVICE static int column() { return warp() % column_warps * 8 * n; }
  template <class P>
  FUSEDATTN_DEVICE static int64_t at(const P& p, uint32_t head, int tile) {
    return (int64_t(head) * p.dq_tiles + tile) * (shape.queries * head_dim) +
           warp() * (4 * m * n * warp_size);
  }

  // To and from the fragment (i, j) of the sums that begin at `sums`.
  FUSEDATTN_DEVICE static void add(float* sums, int i, int j, const Pack<float, 4>& x) {
    sums += (i * n + j) * 4 * warp_size;
    if (adds_packs()) return atomic_add(sums + 4 * anew(lane()), x);
#pragma unroll
    for (int e = 0; e < 4; ++e) atomic_add(sums + e * warp_size + lane(), x[e]);
  }
  FUSEDATTN_DEVICE static Pack<float, 4> read(const float* sums, int i, int j) {
    sums += (i * n + j) * 4 * warp_size;
    if (adds_packs()) return load_streaming<4>(sums + 4 * lane());
    Pack<float, 4> x;
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = load_streaming(sums + e * warp_size + lane());
    return x;
  }
};

}  // namespace fusedattn::cuda
