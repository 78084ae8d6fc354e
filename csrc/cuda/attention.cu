// Attention on NVIDIA GPUs; the maths stands in sm80/attention_forward.cuh and
// attention_backward.cuh. Here: which instantiation serves a call.
#include "kernels.h"
#include "sm80/attention_launch.h"

namespace fusedattn::cuda {
namespace {

std::string text(const AttentionForward& p) {
  const auto number = [](int64_t n) { return std::to_string(n); };
  const char* const dtypes[] = {"float16", "bfloat16", "float32", "float64"};
  return std::string(dtypes[int(p.dtype())]) + ", B " + number(p.batch()) + ", Hq " +
         number(p.heads()) + ", Hkv " + number(p.heads_kv()) + ", Sq " + number(p.longest_q()) +
         ", Sk " + number(p.longest_k()) + ", D " + number(p.head_dim()) + ", Dv " +
         number(p.head_dim_v());
}

// Throws for what the kernels cannot run: packs of 8 lie side by side in `tensors`, and numbers of
// rows and tiles, and their sums, fit in 32 bits.
void check(const AttentionForward& p, std::initializer_list<const TensorView*> tensors) {
  constexpr int64_t most_rows = int64_t{1} << 30, most_sequences = int64_t{1} << 22;
  const auto packs = [](int64_t width) { return width % 8 == 0 && width <= 256; };
  bool fits =
      (p.dtype() == DType::f16 || p.dtype() == DType::bf16) && !p.mask && !p.distance_bias &&
      !p.prefix_lengths && !p.documents_q && !p.mask_blocks && !p.options.cached &&
      packs(p.head_dim()) && packs(p.head_dim_v()) && p.longest_q() <= most_rows &&
      p.longest_k() <= most_rows && (!p.cu_seqlens_q || p.sequences() <= most_sequences) &&
      p.batch() * p.heads() <= most_rows && (!p.kv_lengths || p.kv_lengths.dtype == DType::i32);
  for (const TensorView* each : tensors) fits = fits && (!*each || aligned(*each, 4, 8, 2));
  if (!fits)
    throw std::invalid_argument(
        "fusedattn: CUDA attention takes float16 and bfloat16, rows of aligned 16 bytes, D and Dv "
        "up to 256, int32 kv_lengths, and no mask, rule or cache; got " +
        text(p));
}

// call(element, std::integral_constant<int, head_dim>) for the instantiation that serves p.
template <class Function>
void instantiation(const AttentionForward& p, const Function& call) {
  const auto with_width = [&](auto element) {
    switch (row_for(p.head_dim(), p.head_dim_v())) {
      case 64:
        return call(element, std::integral_constant<int, 64>());
      case 96:
        return call(element, std::integral_constant<int, 96>());
      case 128:
        return call(element, std::integral_constant<int, 128>());
      case 192:
        return call(element, std::integral_constant<int, 192>());
      default:
        return call(element, std::integral_constant<int, 256>());
    }
  };
  // A launch that fails says which kernel; the shapes come from here.
  try {
    return p.dtype() == DType::f16 ? with_width(f16()) : with_width(bf16());
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(error.what()) + "; attention of " + text(p));
  }
}

template <class Shape>
AttentionTiles row_of(const char* kernel, int head_dim, Variant variant, const Shape& s) {
  return {kernel, head_dim, int(variant), s.threads(), s.blocks, s.shared_bytes};
}

}  // namespace

std::vector<AttentionTiles> attention_tiles() {
  std::vector<AttentionTiles> all;
  const auto add = [&](const char* kernel, const auto& rows) {
    for (const auto& row : rows) {
      all.push_back(row_of(kernel, row.head_dim, Variant::large, row.large));
      all.push_back(row_of(kernel, row.head_dim, Variant::little, row.little));
      all.push_back(row_of(kernel, row.head_dim, Variant::ruled, row.ruled));
    }
  };
  add("attention_forward", forward_rows);
  add("attention_backward_keys", keys_rows);
  for (const QueriesRow& row : queries_rows) {
    all.push_back(row_of("attention_backward_queries", row.head_dim, Variant::large, row.large));
    all.push_back(row_of("attention_backward_queries", row.head_dim, Variant::ruled, row.ruled));
  }
  for (const BiasRow& row : bias_rows)
    all.push_back(row_of("attention_backward_bias", row.head_dim, Variant::ruled, row.shape));
  return all;
}

void run(const AttentionForward& p, Stream stream) {
  check(p, {&p.q, &p.k, &p.v, &p.out});
  instantiation(p, [&]<class T, int head_dim>(T, std::integral_constant<int, head_dim>) {
    launch_attention_forward<T, head_dim>(p, stream);
  });
}

void run(const AttentionBackward& p, Stream stream) {
  check(p, {&p.q, &p.k, &p.v, &p.out, &p.dout, &p.dq, &p.dk, &p.dv});
  instantiation(p, [&]<class T, int head_dim>(T, std::integral_constant<int, head_dim>) {
    launch_attention_backward<T, head_dim>(p, stream);
  });
}

}  // namespace fusedattn::cuda
