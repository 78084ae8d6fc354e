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
                                        {"scales", nullptr, Read::refused},
                                        {"seed", &P::seed},
                                        {"bias_table", nullptr, Read::refused},
                                        {"prefix_lengths", nullptr, Read::refused},
                                        {"documents_q", nullptr, Read::refused},
                                        {"documents_k", nullptr, Read::refused},
                                        {"mask_blocks", nullptr, Read::refused},
                                        {"cu_seqlens_q", &P::cu_seqlens_q},
                                        {"cu_seqlens_k", &P::cu_seqlens_k},
                                        {"block_table", nullptr, Read::refused}};
  static constexpr Field<P> outputs[] = {{"out", &P::out}, {"lse", &P::lse}};
  static constexpr auto config =
      std::tuple(Option{"causal", &O::causal, Causal::bottom_right}, Option{"scale", &O::scale},
                 Option{"deterministic", &O::deterministic}, Option{"softcap", &O::softcap},
                 Option{"window_left", &O::window_left}, Option{"window_right", &O::window_right},
                 Option{"dropout_p", &O::dropout_p}, Unread{"max_seqlen_q"}, Unread{"max_seqlen_k"},
                 Unread{"table_kind"}, Unread{"table_distance"}, Unread{"block_size"});
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
                                        {"scales", nullptr, Read::refused},
                                        {"seed", &P::seed},
                                        {"bias_table", nullptr, Read::refused},
                                        {"prefix_lengths", nullptr, Read::refused},
                                        {"documents_q", nullptr, Read::refused},
                                        {"documents_k", nullptr, Read::refused},
                                        {"mask_blocks", nullptr, Read::refused},
                                        {"cu_seqlens_q", &P::cu_seqlens_q},
                                        {"cu_seqlens_k", &P::cu_seqlens_k},
                                        {"block_table", nullptr, Read::refused},
                                        {"bias_grad", nullptr, Read::unread},
                                        {"alibi_slopes_grad", nullptr, Read::unread},
                                        {"sinks_grad", nullptr, Read::unread},
                                        {"scales_grad", nullptr, Read::unread},
                                        {"bias_table_grad", nullptr, Read::unread}};
  static constexpr Field<P> outputs[] = {{"dq", &P::dq},
                                         {"dk", &P::dk},
                                         {"dv", &P::dv},
                                         {"dbias", &P::dbias, Read::broadcast},
                                         {"dalibi_slopes", &P::dalibi_slopes, Read::broadcast}};
  static constexpr auto config = Call<AttentionForward>::config;
};

// The sequences of a packed call share the one batch entry of its tensors.
inline void share_batch(const AttentionForward& p, std::initializer_list<TensorView*> tensors) {
  if (!p.cu_seqlens_q) return;
  for (TensorView* each : tensors) each->stride[0] = 0;
}

template <>
inline void settle(AttentionForward& p) {
  share_batch(p, {&p.q, &p.k, &p.v, &p.out, &p.lse});
}

template <>
inline void settle(AttentionBackward& p) {
  share_batch(p, {&p.q, &p.k, &p.v, &p.out, &p.lse, &p.dout, &p.dlse, &p.dq, &p.dk, &p.dv});
}

// Offsets have the sequences that the call has, and do without what is of a padded batch.
inline void check_packed(const AttentionForward& p) {
  if (!p.cu_seqlens_q && !p.cu_seqlens_k) return;
  const int64_t n = p.cu_seqlens_q.shape[0];
  Argument("cu_seqlens_q", p.cu_seqlens_q).given().shape({n}).integer();
  Argument("cu_seqlens_k", p.cu_seqlens_k).given().shape({n}).integer();
  if (n < 2 || p.batch() != 1 || p.mask || p.bias || p.kv_lengths)
    throw py::value_error("fusedattn: got " + std::to_string(n) + " cu_seqlens_q and " +
                          std::to_string(p.batch()) +
                          " batch entries, expected at least 2 and 1, and no mask, bias or "
                          "kv_lengths");
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
  check_packed(p);
  Argument("alibi_slopes", p.alibi_slopes).broadcasts({p.sequences(), heads}).dtype(wide(dtype));
  Argument("sinks", p.sinks).broadcasts({1, heads}).dtype(wide(dtype));
  if (p.options.dropout_p != 0) Argument("seed", p.seed).given();
  Argument("seed", p.seed).shape({1}).dtype(DType::i64);
  Argument("out", p.out).given().shape({batch, heads, p.longest_q(), p.head_dim_v()}).dtype(dtype);
  Argument("lse", p.lse).given().shape({batch, heads, p.longest_q()}).dtype(wide(dtype));
}

template <>
inline void check(const AttentionBackward& p) {
  check<AttentionForward>(p);
  const auto like = [](const char* name, const TensorView& view, const TensorView& other) {
    const int64_t* n = other.shape;
    return Argument(name, view).shape({n[0], n[1], n[2], n[3]}).dtype(other.dtype);
  };
  like("dout", p.dout, p.out);
  like("dlse", p.dlse, p.lse);
  like("dq", p.dq, p.q).given();
  like("dk", p.dk, p.k).given();
  like("dv", p.dv, p.v).given();
  if (p.dbias) Argument("bias", p.bias).given();
  like("dbias", p.dbias, p.bias);
  if (p.dalibi_slopes) Argument("alibi_slopes", p.alibi_slopes).given();
  like("dalibi_slopes", p.dalibi_slopes, p.alibi_slopes);
}

}  // namespace fusedattn::bindings
