// The gradient of a bias from fp32 sums, which attention_backward_keys has added up: rounded, to
// where it lies.
//
// A warp has a part of a row.
#include "cuda/attention_schedule.h"
#include "sm80/attention_launch.h"

namespace fusedattn::cuda {
namespace {

constexpr int threads = 128, part = 8 * warp_size;

struct Rounding {
  TensorView dbias;
  const float* sums;
};

FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(threads, 4)
    attention_bias(const FUSEDATTN_GRID_CONSTANT Rounding x) {
  const TensorView& dbias = x.dbias;
  const int64_t* const shape = dbias.shape;
  const int64_t parts = ceil_div(shape[3], part);
  const int64_t at = block() * (threads / warp_size) + warp(), row = at / parts;
  const int64_t head = row / shape[2], i = row - head * shape[2];
  const int64_t b = head / shape[1], h = head - b * shape[1];
  if (!below(b, shape[0])) return;
  const int64_t first = (at - row * parts) * part + lane();
#pragma unroll
  for (int k = 0; k < part; k += warp_size) {
    const int64_t j = first + k;
    if (!below(j, shape[3])) return;
    const float sum = load_streaming(x.sums + row * shape[3] + j);
    if (dbias.dtype == DType::f32)
      store(dbias.at<float>(b, h, i, j), sum);
    else if (dbias.dtype == DType::f16)
      store(dbias.at<f16>(b, h, i, j), from_float<f16>(sum));
    else
      store(dbias.at<bf16>(b, h, i, j), from_float<bf16>(sum));
  }
}

}  // namespace

void launch_attention_bias(const TensorView& dbias, const float* sums, Launch launch) {
  const int64_t rows = dbias.shape[0] * dbias.shape[1] * dbias.shape[2];
  launch.block = threads;
  launch.grid = ceil_div(rows * ceil_div(dbias.shape[3], part), threads / warp_size);
  launch.shared_bytes = 0;
  cuda::launch("attention_bias", attention_bias, launch, Rounding{dbias, sums});
}

}  // namespace fusedattn::cuda
