// The forward of attention where the keys are split between blocks: out and lse of all keys from
// out_i and lse_i of part i (Dao et al. 2023, Flash-Decoding),
//
//   lse = log Σ exp(lse_i)     out = Σ exp(lse_i − lse) out_i
//
// and a sink is one more part, of no value.
//
// A warp has a query, a lane 8 columns of it. The parts are added in their order: the result is the
// same each time.
#include "sm80/attention_launch.h"
#include "sm80/attention_scores.cuh"

namespace fusedattn::cuda {
namespace {

constexpr int columns = 8, threads = 128;

struct Combine {
  TensorView out, lse;
  TensorView sinks;  // may be absent
  Parts parts;
  int64_t rows, queries;  // B · Hq · Sq, Sq
};

template <class T>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(threads, 4)
    attention_combine(const FUSEDATTN_GRID_CONSTANT Combine p) {
  const int64_t row = block() * (threads / warp_size) + warp();
  if (!below(row, p.rows)) return;
  const int count = int(p.parts.count), column = lane() * columns;
  float highest = -INFINITY;
  for (int i = 0; i < count; ++i) highest = ::fmaxf(highest, load(p.parts.lse + i * p.rows + row));
  if (highest == -INFINITY) highest = 0.0f;  // nothing was seen

  const int64_t width = p.out.shape[3];
  const bool mine = column < width;
  float total = 0.0f;
  Pack<float, columns> sum = {};
  for (int i = 0; below(i, count); ++i) {
    const int64_t at = i * p.rows + row;
    const float weight = exp2((load(p.parts.lse + at) - highest) * log2_e);
    total += weight;
    if (!mine) continue;
    const auto x = load_streaming<columns>(p.parts.out + at * width + column);
#pragma unroll
    for (int e = 0; e < columns; ++e) sum[e] = fma(weight, x[e], sum[e]);
  }
  const int64_t head = row / p.queries, query = row - head * p.queries;
  const int64_t b = head / p.out.shape[1], h = head - b * p.out.shape[1];
  float others = 1.0f;
  if (present(p.sinks) && total != 0.0f)
    others = add_sink(highest, total, load(p.sinks.at<float>(0, h)));
  if (lane() == 0) store(p.lse.at<float>(b, h, query), fma(log2(total), ln_2, highest));
  if (!mine) return;
  const float share = total == 0.0f ? 0.0f : others / total;
#pragma unroll
  for (int e = 0; e < columns; ++e) sum[e] *= share;
  store(p.out.at<T>(b, h, query) + column, narrow<T>(sum));
}

}  // namespace

void launch_attention_combine(const AttentionForward& p, const Parts& parts, Launch launch) {
  const int64_t rows = p.batch() * p.heads() * p.longest_q();
  const Combine combine = {p.out, p.lse, p.sinks, parts, rows, p.longest_q()};
  launch.block = threads;
  launch.grid = ceil_div(rows, threads / warp_size);
  launch.shared_bytes = 0;
  if (p.dtype() == DType::f16)
    cuda::launch("attention_combine", attention_combine<f16>, launch, combine);
  else
    cuda::launch("attention_combine", attention_combine<bf16>, launch, combine);
}

}  // namespace fusedattn::cuda
