// The gradient of the slopes of ALiBi: sums of −ds · distance, one from each warp of each tile of
// attention_backward_keys, added up in their order: the result is the same each time. A slope may
// be that of a head of all sequences, or of one.
//
// A warp has a slope.
#include "sm80/attention_launch.h"
#include "sm80/attention_scores.cuh"

namespace fusedattn::cuda {
namespace {

constexpr int threads = 128;

struct Slopes {
  AttentionBackward p;
  SlopeSums sums;
};

FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(threads, 4)
    attention_slopes(const FUSEDATTN_GRID_CONSTANT Slopes x) {
  const AttentionBackward& p = x.p;
  const int64_t at = block() * (threads / warp_size) + warp(), heads = p.heads();
  if (!below(at, p.dalibi_slopes.shape[0] * heads)) return;
  const int64_t of = at / heads, h = at - of * heads;
  int64_t b = 0, batch = p.batch(), begin = 0, end = x.sums.tiles;
  if (p.dalibi_slopes.shape[0] != 1) {
    if (present(p.cu_seqlens_k)) {
      const auto first = [&](int64_t number) {
        return packed_row(p.cu_seqlens_k, int(number), p.longest_k()) / x.sums.keys + number;
      };
      begin = first(of);
      end = first(of + 1);
    } else {
      b = of;
      batch = of + 1;
    }
  }
  float sum = 0.0f;
  for (; b < batch; ++b) {
    const float* from = x.sums.sums + (b * heads + h) * x.sums.tiles * x.sums.warps;
    for (int64_t i = begin * x.sums.warps + lane(); below(i, end * x.sums.warps); i += warp_size)
      sum += load(from + i);
  }
#pragma unroll
  for (int apart = warp_size / 2; apart > 0; apart /= 2) sum += shuffle_xor(sum, apart);
  if (lane() == 0) store(p.dalibi_slopes.at<float>(of, h), sum);
}

}  // namespace

void launch_attention_slopes(const AttentionBackward& p, const SlopeSums& sums, Launch launch) {
  launch.block = threads;
  launch.grid = ceil_div(p.dalibi_slopes.shape[0] * p.heads(), threads / warp_size);
  launch.shared_bytes = 0;
  cuda::launch("attention_slopes", attention_slopes, launch, Slopes{p, sums});
}

}  // namespace fusedattn::cuda
