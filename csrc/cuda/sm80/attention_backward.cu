// The launchers of attention's backward. setup.py compiles this file once for each
// FUSEDATTN_ELEMENT and FUSEDATTN_HEAD_DIM.
#include "attention_backward_dq.cuh"
#include "attention_config.h"
#include "attention_launch.h"

namespace fusedattn::cuda {
namespace {

int64_t padded(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

template <class T, int head_dim, Memory memory>
void launch_keys(Backward b, Launch launch) {
  constexpr KeysShape shape = keys_shape(head_dim, memory);
  const int64_t heads = b.batch() * b.heads(), heads_kv = b.batch() * b.heads_kv();
  const int64_t tiles = ceil_div(b.longest_q(), shape.queries), terms = heads * b.rows;
  const int64_t sums = b.options.deterministic ? 0 : heads * tiles * shape.queries * head_dim;
  const int64_t norms = scales_ds<T> ? norms_of_head * heads_kv : 0;
  const int64_t scales = scales_ds<T> ? heads : 0;
  constexpr int64_t bytes = sizeof(float);
  const Workspace workspace((2 * terms + sums + norms + scales) * bytes, launch.stream,
                            launch.device);
  b.shift = workspace.as<float>();
  b.delta = b.shift + terms;
  float* const zeros = b.delta + terms;
  b.norms = zeros + sums;
  b.ds_scales = b.norms + norms;
  if (sums + norms != 0) set_zero(zeros, (sums + norms) * bytes, launch.stream, launch.device);
  if constexpr (scales_ds<T>) {
    launch.block = norms_threads;
    launch.grid = norms_blocks(b);
    cuda::launch("attention_backward_norms", attention_backward_norms<T, Backward>, launch, b);
  }
  launch.block = terms_threads;
  launch.grid = terms * terms_team / terms_threads;
  cuda::launch("attention_backward_rows", attention_backward_rows<T>, launch, b);

  if (sums != 0) {
    b.dq_sum = zeros;
    b.dq_tiles = uint32_t(tiles);
  }
  const int64_t row_bytes = 2 * (b.head_dim() + b.head_dim_v()), cache = cache_bytes(launch.device);
  b.tiles = uint32_t(ceil_div(b.longest_k(), shape.keys));
  b.section = uint32_t(section_of(heads_kv, b.group() * b.longest_q() * row_bytes, cache));
  launch.block = shape.threads();
  launch.grid = b.tiles * heads_kv;
  launch.shared_bytes = shape.shared_bytes;
  cuda::launch("attention_backward_keys", attention_backward_keys<T, head_dim, memory>, launch, b);

  if (sums != 0) {
    launch.grid = heads * tiles;
    launch.shared_bytes = 2 * shape.queries * head_dim;
    cuda::launch("attention_backward_round", attention_backward_round<T, head_dim, memory>, launch,
                 b);
  } else {
    constexpr QueriesShape queries = queries_shape(head_dim);
    b.tiles = uint32_t(ceil_div(b.longest_q(), queries.queries));
    b.section = uint32_t(b.group() * section_of(heads_kv, b.longest_k() * row_bytes, cache));
    launch.block = queries.threads();
    launch.grid = b.tiles * heads;
    launch.shared_bytes = queries.shared_bytes;
    cuda::launch("attention_backward_queries", attention_backward_queries<T, head_dim>, launch, b);
  }
}

}  // namespace

template <class T, int head_dim>
void launch_attention_backward(const AttentionBackward& p, Stream stream) {
  Backward b = {p, nullptr, nullptr, nullptr, 0,       0.0f,   Rules(p.options),
                0, 0,       0,       0,       nullptr, nullptr};
  b.rows = padded(p.longest_q(), row_padding);
  b.heads_together = uint32_t(p.group());
  b.scale = float(p.options.scale);
  Launch launch;
  launch.stream = stream;
  launch.device = p.q.device;
  if (memory_of(max_shared_bytes(launch.device)) == Memory::large)
    launch_keys<T, head_dim, Memory::large>(b, launch);
  else
    launch_keys<T, head_dim, Memory::little>(b, launch);
}

template void launch_attention_backward<FUSEDATTN_ELEMENT, FUSEDATTN_HEAD_DIM>(
    const AttentionBackward&, Stream);

}  // namespace fusedattn::cuda
