// Attention's calls as parameter structs, and what they have to be.
#pragma once

#include "attention.h"
#include "call.h"

namespace fusedattn::bindings {

// AttentionCall and AttentionConfig of fusedattn/ops/attention_config.py.
template <>
struct Call<AttentionForward> {
  using P = AttentionForward;
  using O = AttentionOptions;
  static constexpr const char* name = "attention_forward";
  static constexpr Field<P> fields[] = {{"q", &P::q},
                                        {"k", &P::k},
                                        {"v", &P::v},
                                        {"mask", &P::mask, Read::broadcast},
                                        {"bias", &P::bias, Read::broadcast},
                                        {"kv_lengths", &P::kv_lengths},
                                        {"alibi_slopes", &P::alibi_slopes, Read::broadcast},
                                        {"sinks", &P::sinks, Read::broadcast},
                                        {"seed", &P::seed},
                                        {"distance_bias", &P::distance_bias, Read::broadcast},
                                        {"prefix_lengths", &P::prefix_lengths},
                                        {"documents_q", &P::documents_q, Read::broadcast},
                                        {"documents_k", &P::documents_k, Read::broadcast},
                                        {"mask_blocks", &P::mask_blocks, Read::broadcast},
                                        {"cu_seqlens_q", &P::cu_seqlens_q},
                                        {"cu_seqlens_k", &P::cu_seqlens_k},
                                        {"block_table", &P::block_table}};
  static constexpr Field<P> outputs[] = {{"out", &P::out}, {"lse", &P::lse}};
  static constexpr auto config =
      std::tuple(Option{"causal", &O::causal, Causal::bottom_right}, Option{"scale", &O::scale},
                 Option{"deterministic", &O::deterministic}, Option{"softcap", &O::softcap},
                 Option{"window_left", &O::window_left}, Option{"window_right", &O::window_right},
                 Option{"dropout_p", &O::dropout_p}, Unread{"max_seqlen_q"}, Unread{"max_seqlen_k"},
                 Option{"block_size", &O::block_size}, Option{"cached", &O::cached});
};

// AttentionBackwardCall.
template <>
struct Call<AttentionBackward> {
  using P = AttentionBackward;
  static constexpr const char* name = "attention_backward";
  static constexpr Field<P> fields[] = {{"dout", &P::dout},
                                        {"dlse", &P::dlse},
                                        {"out", &P::out},
                                        {"lse", &P::lse},
                                        {"q", &P::q},
                                        {"k", &P::k},
                                        {"v", &P::v},
                                        {"mask", &P::mask, Read::broadcast},
                                        {"bias", &P::bias, Read::broadcast},
                                        {"kv_lengths", &P::kv_lengths},
                                        {"alibi_slopes", &P::alibi_slopes, Read::broadcast},
                                        {"sinks", &P::sinks, Read::broadcast},
                                        {"seed", &P::seed},
                                        {"distance_bias", &P::distance_bias, Read::broadcast},
                                        {"prefix_lengths", &P::prefix_lengths},
                                        {"documents_q", &P::documents_q, Read::broadcast},
                                        {"documents_k", &P::documents_k, Read::broadcast},
                                        {"mask_blocks", &P::mask_blocks, Read::broadcast},
                                        {"cu_seqlens_q", &P::cu_seqlens_q},
                                        {"cu_seqlens_k", &P::cu_seqlens_k},
                                        {"block_table", &P::block_table},
                                        {"q_grad", nullptr, Read::unread},
                                        {"k_grad", nullptr, Read::unread},
                                        {"v_grad", nullptr, Read::unread},
                                        {"bias_grad", nullptr, Read::unread},
                                        {"alibi_slopes_grad", nullptr, Read::unread},
                                        {"sinks_grad", nullptr, Read::unread},
                                        {"distance_bias_grad", nullptr, Read::unread}};
  static constexpr Field<P> outputs[] = {{"dq", &P::dq},
                                         {"dk", &P::dk},
                                         {"dv", &P::dv},
                                         {"dbias", &P::dbias, Read::broadcast},
                                         {"dalibi_slopes", &P::dalibi_slopes, Read::broadcast},
                                         {"ddistance_bias", &P::ddistance_bias, Read::broadcast}};
  static constexpr auto config = Call<AttentionForward>::config;
};

// AttentionJvpCall.
template <>
struct Call<AttentionJvp> {
  using P = AttentionJvp;
  static constexpr const char* name = "attention_jvp";
  static constexpr Field<P> fields[] = {{"q", &P::q},
                                        {"k", &P::k},
                                        {"v", &P::v},
                                        {"mask", &P::mask, Read::broadcast},
                                        {"bias", &P::bias, Read::broadcast},
                                        {"kv_lengths", &P::kv_lengths},
                                        {"alibi_slopes", &P::alibi_slopes, Read::broadcast},
                                        {"sinks", &P::sinks, Read::broadcast},
                                        {"seed", &P::seed},
                                        {"distance_bias", &P::distance_bias, Read::broadcast},
                                        {"prefix_lengths", &P::prefix_lengths},
                                        {"documents_q", &P::documents_q, Read::broadcast},
                                        {"documents_k", &P::documents_k, Read::broadcast},
                                        {"mask_blocks", &P::mask_blocks, Read::broadcast},
                                        {"cu_seqlens_q", &P::cu_seqlens_q},
                                        {"cu_seqlens_k", &P::cu_seqlens_k},
                                        {"block_table", &P::block_table},
                                        {"t_q", &P::t_q},
                                        {"t_k", &P::t_k},
                                        {"t_v", &P::t_v},
                                        {"t_bias", &P::t_bias, Read::broadcast}};
  static constexpr Field<P> outputs[] = {
      {"out", &P::out}, {"lse", &P::lse}, {"t_out", &P::t_out}, {"t_lse", &P::t_lse}};
  static constexpr auto config = Call<AttentionForward>::config;
};

// The sequences of a packed call share the one batch entry of its tensors.
inline void share_batch(const AttentionForward& p, std::initializer_list<TensorView*> tensors) {
  if (!p.cu_seqlens_q) return;
  for (TensorView* each : tensors) each->stride[0] = 0;
}

// Keys in pages are as many as a table has room for.
inline void spread_pages(AttentionForward& p) {
  if (!p.block_table) return;
  p.pages = p.k.shape[0];
  p.page_rows = p.k.shape[2];
  for (TensorView* each : {&p.k, &p.v}) {
    if (each->shape[0] != p.pages || each->shape[2] != p.page_rows) continue;  // is refused
    each->shape[0] = p.batch();
    each->shape[2] = p.block_table.shape[1] * p.page_rows;
  }
}

template <>
inline void settle(AttentionForward& p) {
  share_batch(p, {&p.q, &p.k, &p.v, &p.out, &p.lse});
  spread_pages(p);
}

template <>
inline void settle(AttentionBackward& p) {
  share_batch(p, {&p.q, &p.k, &p.v, &p.out, &p.lse, &p.dout, &p.dlse, &p.dq, &p.dk, &p.dv});
}

template <>
inline void settle(AttentionJvp& p) {
  share_batch(p, {&p.q, &p.k, &p.v, &p.out, &p.lse, &p.t_q, &p.t_k, &p.t_v, &p.t_out, &p.t_lse});
}

// Offsets have the sequences that the call has, and do without what is of a padded batch.
inline void check_packed(const AttentionForward& p) {
  if (!p.cu_seqlens_q && !p.cu_seqlens_k) return;
  const int64_t n = p.cu_seqlens_q.shape[0];
  Argument("cu_seqlens_q", p.cu_seqlens_q).given().shape({n}).integer();
  Argument("cu_seqlens_k", p.cu_seqlens_k).given().shape({n}).integer();
  if (n < 2 || p.batch() != 1 || p.mask || p.bias || p.kv_lengths || p.documents_q || p.mask_blocks)
    throw py::value_error("fusedattn: got " + std::to_string(n) + " cu_seqlens_q and " +
                          std::to_string(p.batch()) +
                          " batch entries, expected at least 2 and 1, and no mask, bias, "
                          "kv_lengths, documents or mask_blocks");
}

inline void check_cache(const AttentionForward& p) {
  Argument("block_table", p.block_table).shape({p.batch(), p.block_table.shape[1]}).integer();
  if ((p.options.cached || p.block_table) && p.cu_seqlens_q)
    throw py::value_error("fusedattn: got cu_seqlens_q of a cache, expected none");
  if (p.block_table && (!p.options.cached || p.pages < 1 || p.page_rows < 1))
    throw py::value_error("fusedattn: got block_table with " + std::to_string(p.pages) +
                          " pages of " + std::to_string(p.page_rows) +
                          " rows, expected some, and `cached`");
}

inline void check_rules(const AttentionForward& p) {
  const int64_t batch = p.batch(), seq_q = p.longest_q(), seq_k = p.longest_k();
  Argument("distance_bias", p.distance_bias)
      .broadcasts({batch, p.heads(), 1, seq_q + seq_k - 1})
      .dtype(wide(p.dtype()));
  if (p.distance_bias && p.distance_bias.shape[3] != seq_q + seq_k - 1)
    throw py::value_error("fusedattn: got distance_bias of " +
                          std::to_string(p.distance_bias.shape[3]) + " distances, expected " +
                          std::to_string(seq_q + seq_k - 1));
  Argument("prefix_lengths", p.prefix_lengths).shape({p.sequences()}).integer();
  if (bool(p.documents_q) != bool(p.documents_k))
    throw py::value_error("fusedattn: got one of documents_q and documents_k, expected both");
  const auto ids = [&](const char* name, const TensorView& x, int64_t rows) {
    Argument(name, x).broadcasts({batch, rows}).integer();
    if (x && x.shape[1] != rows) Argument(name, x).shape({batch, rows});
  };
  ids("documents_q", p.documents_q, seq_q);
  ids("documents_k", p.documents_k, seq_k);
  if (!p.mask_blocks) return;
  const int64_t size = p.options.block_size;
  if (size < 1)
    throw py::value_error("fusedattn: got block_size " + std::to_string(size) +
                          ", expected at least 1");
  const Sizes blocks = {batch, p.heads(), (seq_q + size - 1) / size, (seq_k + size - 1) / size};
  Argument("mask_blocks", p.mask_blocks).broadcasts(blocks).dtype(DType::boolean);
  if (p.mask_blocks.shape[2] != blocks.of[2] || p.mask_blocks.shape[3] != blocks.of[3])
    Argument("mask_blocks", p.mask_blocks).shape(blocks);
}

template <>
inline void check(const AttentionForward& p) {
  const DType dtype = p.dtype();
  const int64_t batch = p.batch(), heads = p.heads(), heads_kv = p.heads_kv();
  const Sizes scores = {batch, heads, p.longest_q(), p.longest_k()};
  const Sizes keys = {batch, heads_kv, p.longest_k(), p.head_dim()};
  const Sizes values = {batch, heads_kv, p.longest_k(), p.head_dim_v()};
  Argument("q", p.q).given().filled().floating();
  Argument("k", p.k).given().filled().shape(keys).dtype(dtype);
  Argument("v", p.v).given().filled().shape(values).dtype(dtype);
  if (heads % heads_kv != 0)
    throw py::value_error("fusedattn: got " + std::to_string(heads) + " query heads and " +
                          std::to_string(heads_kv) + " key heads, expected a multiple");
  Argument("mask", p.mask).broadcasts(scores).dtype(DType::boolean);
  Argument("bias", p.bias).broadcasts(scores).floating_beside(dtype, true);
  Argument("kv_lengths", p.kv_lengths).shape({batch}).integer();
  check_cache(p);
  check_packed(p);
  check_rules(p);
  Argument("alibi_slopes", p.alibi_slopes).broadcasts({p.sequences(), heads}).dtype(wide(dtype));
  Argument("sinks", p.sinks).broadcasts({1, heads}).dtype(wide(dtype));
  if (p.options.dropout_p != 0) Argument("seed", p.seed).given();
  Argument("seed", p.seed).shape({1}).dtype(DType::i64);
  Argument("out", p.out).given().shape({batch, heads, p.longest_q(), p.head_dim_v()}).dtype(dtype);
  Argument("lse", p.lse).given().shape({batch, heads, p.longest_q()}).dtype(wide(dtype));
}

inline Argument like(const char* name, const TensorView& view, const TensorView& other) {
  const int64_t* n = other.shape;
  return Argument(name, view).shape({n[0], n[1], n[2], n[3]}).dtype(other.dtype);
}

template <>
inline void check(const AttentionBackward& p) {
  check<AttentionForward>(p);
  if (p.options.cached)
    throw py::value_error("fusedattn: got `cached`, which has no gradient, expected false");
  like("dout", p.dout, p.out);
  like("dlse", p.dlse, p.lse);
  like("dq", p.dq, p.q);
  like("dk", p.dk, p.k);
  like("dv", p.dv, p.v);
  if (p.dbias) Argument("bias", p.bias).given();
  like("dbias", p.dbias, p.bias);
  if (p.dalibi_slopes) Argument("alibi_slopes", p.alibi_slopes).given();
  like("dalibi_slopes", p.dalibi_slopes, p.alibi_slopes);
  if (p.ddistance_bias) Argument("distance_bias", p.distance_bias).given();
  like("ddistance_bias", p.ddistance_bias, p.distance_bias);
}

template <>
inline void check(const AttentionJvp& p) {
  check<AttentionForward>(p);
  if (p.options.cached)
    throw py::value_error("fusedattn: got `cached`, which has no tangents, expected false");
  like("t_q", p.t_q, p.q);
  like("t_k", p.t_k, p.k);
  like("t_v", p.t_v, p.v);
  if (p.t_bias) Argument("bias", p.bias).given();
  Argument("t_bias", p.t_bias)
      .broadcasts({p.batch(), p.heads(), p.longest_q(), p.longest_k()})
      .dtype(p.bias.dtype);
  like("t_out", p.t_out, p.out).given();
  like("t_lse", p.t_lse, p.lse).given();
}

}  // namespace fusedattn::bindings
