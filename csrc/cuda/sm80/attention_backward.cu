// The launchers of attention's backward. setup.py compiles this file once for each
// FUSEDATTN_ELEMENT and FUSEDATTN_HEAD_DIM.
#include "attention_backward_bias.cuh"
#include "attention_backward_dq.cuh"
#include "attention_config.h"
#include "attention_launch.h"

namespace fusedattn::cuda {
namespace {

int64_t padded(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

// How the gradient of the bias is made: by attention_backward_keys, stored where it lies, added
// there or added elsewhere and rounded; or in order, by attention_backward_bias.
enum class BiasWay { none, stored, added, rounded, in_order };

BiasWay bias_way(const AttentionBackward& p) {
  if (!p.dbias) return BiasWay::none;
  const int64_t scores[] = {p.batch(), p.heads(), p.longest_q(), p.longest_k()};
  bool shared = false, dense = true;
  int64_t elements = 1;
  for (int i = 3; i >= 0; --i) {
    const int64_t n = p.dbias.shape[i];
    shared = shared || n != scores[i];
    dense = dense && (n == 1 || p.dbias.stride[i] == elements);
    elements *= n;
  }
  if (!shared) return BiasWay::stored;
  if (p.options.deterministic) return BiasWay::in_order;
  return dense && p.dbias.dtype == DType::f32 ? BiasWay::added : BiasWay::rounded;
}

int64_t elements_of(const TensorView& x) {
  return x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3];
}

// fp32 sums of the shape of x, side by side.
TensorView sums_like(TensorView x, float* sums) {
  x.data = sums;
  x.dtype = DType::f32;
  int64_t elements = 1;
  for (int i = 3; i >= 0; --i) {
    x.stride[i] = x.shape[i] == 1 ? 0 : elements;
    elements *= x.shape[i];
  }
  return x;
}

template <class T, int head_dim>
void launch_bias(const Backward& b, Launch launch) {
  constexpr QueriesShape tile = bias_shape(head_dim);
  using Kernel = BiasKernel<T, head_dim, tile>;
  launch.block = tile.threads();
  launch.grid = b.dbias.shape[0] * b.dbias.shape[1] * Kernel::down(b) * Kernel::across(b);
  launch.shared_bytes = tile.shared_bytes;
  cuda::launch("attention_backward_bias", attention_backward_bias<T, head_dim>, launch, b);
}

template <class T, int head_dim, Variant variant>
void launch_keys(Backward b, Launch launch) {
  constexpr KeysShape shape = keys_shape(head_dim, variant);
  constexpr bool ruled = variant == Variant::ruled;
  const int64_t heads = b.batch() * b.heads(), heads_kv = b.batch() * b.heads_kv();
  const int64_t tiles = tiles_of(b, Side::queries, shape.queries);
  b.rows = b.cu_seqlens_q ? tiles * shape.queries : padded(b.longest_q(), row_padding);
  b.tile_rows = shape.queries;
  b.tiles = uint32_t(tiles_of(b, Side::keys, shape.keys));
  const int64_t terms = heads * b.rows;
  const int64_t slopes = b.dalibi_slopes ? heads * b.tiles * shape.warps : 0;
  const int64_t sums = b.options.deterministic ? 0 : heads * tiles * shape.queries * head_dim;
  const int64_t norms = scales_ds<T> ? norms_of_head * heads_kv : 0;
  const BiasWay bias = ruled ? bias_way(b) : BiasWay::none;
  const int64_t biases = bias == BiasWay::rounded ? elements_of(b.dbias) : 0;
  const int64_t scales = scales_ds<T> ? heads : 0;
  const int64_t added = sums + norms + slopes + biases;
  constexpr int64_t bytes = sizeof(float);
  const Workspace workspace((2 * terms + added + scales) * bytes, launch.stream, launch.device);
  b.shift = workspace.as<float>();
  b.delta = b.shift + terms;
  float* const zeros = b.delta + terms;
  b.norms = zeros + sums;
  if (slopes != 0) b.slope_sums = b.norms + norms;
  float* const bias_sums = b.norms + norms + slopes;
  b.ds_scales = zeros + added;
  if (added != 0) set_zero(zeros, added * bytes, launch.stream, launch.device);
  if (bias == BiasWay::added)
    set_zero(b.dbias.data, elements_of(b.dbias) * bytes, launch.stream, launch.device);
  if (bias == BiasWay::stored || bias == BiasWay::added || bias == BiasWay::rounded)
    b.bias_sums = {bias == BiasWay::rounded ? sums_like(b.dbias, bias_sums) : b.dbias,
                   bias != BiasWay::stored};
  if constexpr (scales_ds<T>) {
    launch.block = norms_threads;
    launch.grid = norms_blocks(b);
    cuda::launch("attention_backward_norms", attention_backward_norms<T, Backward>, launch, b);
  }
  launch.block = terms_threads;
  launch.grid = terms * terms_team / terms_threads;
  cuda::launch("attention_backward_rows", attention_backward_rows<T, ruled>, launch, b);

  if constexpr (ruled)
    if (bias == BiasWay::in_order) launch_bias<T, head_dim>(b, launch);

  if (sums != 0) {
    b.dq_sum = zeros;
    b.dq_tiles = uint32_t(tiles);
  }
  const int64_t row_bytes = 2 * (b.head_dim() + b.head_dim_v()), cache = cache_bytes(launch.device);
  b.section = uint32_t(section_of(heads_kv, b.group() * b.longest_q() * row_bytes, cache));
  launch.block = shape.threads();
  launch.grid = b.tiles * heads_kv;
  launch.shared_bytes = shape.shared_bytes;
  cuda::launch("attention_backward_keys", attention_backward_keys<T, head_dim, variant>, launch, b);
  if (slopes != 0)
    launch_attention_slopes(b, {b.slope_sums, b.tiles, shape.keys, shape.warps}, launch);
  if (biases != 0) launch_attention_bias(b.dbias, bias_sums, launch);

  if (sums != 0) {
    launch.grid = heads * tiles;
    launch.shared_bytes = 2 * shape.queries * head_dim;
    cuda::launch("attention_backward_round", attention_backward_round<T, head_dim, variant>, launch,
                 b);
  } else {
    constexpr QueriesShape queries = queries_shape(head_dim, variant);
    b.tiles = uint32_t(tiles_of(b, Side::queries, queries.queries));
    b.section = uint32_t(b.group() * section_of(heads_kv, b.longest_k() * row_bytes, cache));
    launch.block = queries.threads();
    launch.grid = b.tiles * heads;
    launch.shared_bytes = queries.shared_bytes;
    constexpr Variant kind = ruled ? Variant::ruled : Variant::large;  // one for both sizes
    cuda::launch("attention_backward_queries", attention_backward_queries<T, head_dim, kind>,
                 launch, b);
  }
}

}  // namespace

template <class T, int head_dim>
void launch_attention_backward(const AttentionBackward& p, Stream stream) {
  Backward b = {};
  static_cast<AttentionBackward&>(b) = p;
  b.rules = Rules(p.options);
  b.heads_together = uint32_t(p.group());
  Launch launch;
  launch.stream = stream;
  launch.device = p.q.device;
  if (needs_rules(p))
    launch_keys<T, head_dim, Variant::ruled>(b, launch);
  else if (variant_for(max_shared_bytes(launch.device)) == Variant::large)
    launch_keys<T, head_dim, Variant::large>(b, launch);
  else
    launch_keys<T, head_dim, Variant::little>(b, launch);
}

template void launch_attention_backward<FUSEDATTN_ELEMENT, FUSEDATTN_HEAD_DIM>(
    const AttentionBackward&, Stream);

}  // namespace fusedattn::cuda
