// Attention's parameters, shared by every native backend. Shapes: q (B, Hq, Sq, D),
// k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), out (B, Hq, Sq, Dv), lse (B, Hq, Sq). Packed sequences lie
// one after the other along Sq and Sk of tensors that have B = 1.
#pragma once

#include "kernel_table.h"

namespace fusedattn {

enum class Causal : int { none, top_left, bottom_right };

// deterministic: the same gradients each time, where a kernel would otherwise add them in any
// order.
struct AttentionOptions {
  Causal causal = Causal::none;
  double scale = 1.0;
  bool deterministic = false;
  double softcap = 0.0;      // c: scores are c · tanh(scale · q kᵀ / c) + bias; 0 for none
  int64_t window_left = -1;  // keys seen to either side of the diagonal; below 0: all
  int64_t window_right = -1;
  double dropout_p = 0.0;
  int64_t block_size = 0;  // queries and keys of an element of mask_blocks
  // A cache: the diagonal is that of the keys that exist, not of all that k has room for.
  bool cached = false;
};

// One sequence of the batch, and what its queries see of its keys. Queries and keys are counted
// from its own first; key j of those that exist is row `key_row(j)` of k and v. Where nothing is
// `windowed`, a query sees all keys before its last one, and no code asks for the first.
template <class Int, bool windowed = true>
struct Sequence {
  Int first_q, seq_q;  // rows of q, out and lse
  Int first_k, seq_k;  // of k and v
  Int lower, upper;    // query i sees keys i + lower … i + upper − 1 of those that exist
  Int offset;          // its rows of k less those of q: where ALiBi counts distances from

  FUSEDATTN_MEMBER Int query_row(Int i) const { return first_q + i; }
  FUSEDATTN_MEMBER Int key_row(Int j) const { return first_k + j; }
  FUSEDATTN_MEMBER Int rows_k() const { return seq_q + offset; }  // existing or not

  // Query i sees keys [begin(i), end(i)).
  FUSEDATTN_MEMBER Int begin(Int i) const { return windowed ? within(i + lower, seq_k) : 0; }
  FUSEDATTN_MEMBER Int end(Int i) const { return within(i + upper, seq_k); }

  // The same from the side of the keys: key j is seen by queries [first_query(j), past_query(j)).
  FUSEDATTN_MEMBER Int first_query(Int j) const { return within(j - upper + 1, seq_q); }
  FUSEDATTN_MEMBER Int past_query(Int j) const {
    return windowed ? within(j - lower + 1, seq_q) : seq_q;
  }

 private:
  FUSEDATTN_MEMBER static Int within(Int x, Int most) { return x < 0 ? 0 : x < most ? x : most; }
};

struct AttentionForward {
  TensorView q, k, v;
  TensorView mask;        // bool, strides 0 where broadcast; may be absent
  TensorView bias;        // float, likewise
  TensorView kv_lengths;  // (B,) int32 or int64, of any value; may be absent
  // (B or 1, Hq or 1) in the dtype of lse, strides 0 where broadcast; may be absent.
  TensorView alibi_slopes;  // −slope · |i + Sk − Sq − j| is added to a score
  TensorView sinks;         // one more logit in the sum, of no value
  TensorView seed;          // of dropout, one int64; absent without
  // (N + 1,) int32 or int64, of any value: where each of N packed sequences begins and the last one
  // ends. Either both or none. The kernels' batch entry b is then sequence b, and strides of the
  // tensors' one batch entry are 0.
  TensorView cu_seqlens_q, cu_seqlens_k;
  // (B or 1, Hq or 1, 1, Sq + Sk − 1) in the dtype of lse, of packed sequences the totals: what is
  // added at distance d to the right of the bottom-right diagonal stands at d + Sk − 1.
  TensorView distance_bias;
  // Masks by rule. A query sees the first prefix_lengths (B,) keys and those up to the bottom-right
  // diagonal; keys of its own id, of documents_q (B or 1, Sq) and documents_k (B or 1, Sk); and
  // blocks of block_size queries and keys, (B or 1, Hq or 1, …) bool. Any integers, of any value.
  TensorView prefix_lengths, documents_q, documents_k, mask_blocks;
  // (B, n) int32 or int64, of any value: which pages hold the keys of a sequence, one after the
  // other; may be absent. k and v are then such pages, (pages, Hkv, page_rows, …), though their
  // shapes are those of what the tables can hold: (B, Hkv, n · page_rows, …).
  TensorView block_table;
  int64_t pages = 0, page_rows = 0;
  TensorView out, lse;
  AttentionOptions options;

  FUSEDATTN_MEMBER DType dtype() const { return q.dtype; }
  FUSEDATTN_MEMBER int64_t work() const {
    const int64_t all = longest_q() * longest_k(), n = sequences();
    return cu_seqlens_q ? all / (n * n) : all;
  }
  FUSEDATTN_MEMBER int64_t batch() const { return q.shape[0]; }
  FUSEDATTN_MEMBER int64_t heads() const { return q.shape[1]; }
  FUSEDATTN_MEMBER int64_t heads_kv() const { return k.shape[1]; }
  FUSEDATTN_MEMBER int64_t group() const { return heads() / heads_kv(); }
  FUSEDATTN_MEMBER int64_t head_dim() const { return q.shape[3]; }
  FUSEDATTN_MEMBER int64_t head_dim_v() const { return v.shape[3]; }

  // The lengths that tensors and workspaces have room for: those of the longest sequence.
  FUSEDATTN_MEMBER int64_t longest_q() const { return q.shape[2]; }
  FUSEDATTN_MEMBER int64_t longest_k() const { return k.shape[2]; }

  // Row j of x, which is k or v, of a cache in pages; never outside of it.
  template <class T>
  FUSEDATTN_MEMBER const T* paged_row(const TensorView& x, int64_t b, int64_t h, int64_t j) const {
    const int64_t given = block_table.integer(block_table.offset(b, j / page_rows));
    const int64_t number = given < 0 ? 0 : given < pages ? given : pages - 1;
    return x.at<const T>(number, h, j % page_rows);
  }

  FUSEDATTN_MEMBER int64_t sequences() const {
    return cu_seqlens_q ? cu_seqlens_q.shape[0] - 1 : q.shape[0];
  }

  FUSEDATTN_MEMBER Sequence<int64_t> sequence(int64_t b) const {
    if (cu_seqlens_q) {
      const int64_t first_q = packed_q(b), first_k = packed_k(b);
      const int64_t end_q = packed_q(b + 1), end_k = packed_k(b + 1);
      return packed_sequence<int64_t>(first_q, end_q, first_k, end_k);
    }
    int64_t keys = longest_k();
    if (kv_lengths) {
      const int64_t n = kv_lengths.integer(b * kv_lengths.stride[0]);
      keys = n < 0 ? 0 : n < keys ? n : keys;
    }
    return options.cached ? bounded<int64_t>(0, longest_q(), 0, keys, keys) : with_keys(keys);
  }

  // Where packed sequence b begins, and the one before it ends; never outside the tensors.
  FUSEDATTN_MEMBER int64_t packed_q(int64_t b) const {
    return packed(cu_seqlens_q, b, longest_q());
  }
  FUSEDATTN_MEMBER int64_t packed_k(int64_t b) const {
    return packed(cu_seqlens_k, b, longest_k());
  }

  // The packed sequence of these rows; none where they end before they begin.
  template <class Int>
  FUSEDATTN_MEMBER Sequence<Int> packed_sequence(int64_t first_q, int64_t end_q, int64_t first_k,
                                                 int64_t end_k) const {
    const int64_t queries = end_q < first_q ? 0 : end_q - first_q;
    const int64_t keys = end_k < first_k ? 0 : end_k - first_k;
    return bounded<Int>(first_q, queries, first_k, keys, Int(keys));
  }

  // The sequence of a batch element of which so many keys exist.
  template <class Int, bool windowed = true>
  FUSEDATTN_MEMBER Sequence<Int, windowed> with_keys(Int keys) const {
    return bounded<Int, windowed>(0, longest_q(), 0, longest_k(), keys);
  }

 private:
  FUSEDATTN_MEMBER static int64_t packed(const TensorView& cu_seqlens, int64_t b, int64_t rows) {
    const int64_t at = cu_seqlens.integer(b * cu_seqlens.stride[0]);
    return at < 0 ? 0 : at < rows ? at : rows;
  }

  // Of so many rows of q and k, of which so many keys exist. The bounds are no wider than these, so
  // that sums stay in the range of Int.
  template <class Int, bool windowed = true>
  FUSEDATTN_MEMBER Sequence<Int, windowed> bounded(int64_t first_q, int64_t queries,
                                                   int64_t first_k, int64_t all, Int keys) const {
    const int64_t diagonal = options.causal == Causal::top_left ? 0 : all - queries;
    const int64_t left = options.window_left;
    const int64_t right = options.causal == Causal::none ? options.window_right : 0;
    const bool all_left = left < 0 || left >= diagonal + queries;
    const bool all_right = right < 0 || right >= all - diagonal;
    return {Int(first_q),
            Int(queries),
            Int(first_k),
            keys,
            Int(all_left ? 1 - queries : diagonal - left),
            Int(all_right ? all : diagonal + right + 1),
            Int(all - queries)};
  }
};

// What is not wanted is absent.
struct AttentionBackward : AttentionForward {
  TensorView dout, dlse;  // absent: zero
  TensorView dq, dk, dv;
  TensorView dbias, dalibi_slopes, ddistance_bias;  // the shapes of these
};

// Forward mode: out, lse and their derivatives along tangents, of which an absent one is zero.
struct AttentionJvp : AttentionForward {
  TensorView t_q, t_k, t_v;  // the shapes and the dtype of these
  TensorView t_bias;         // of the dtype of the bias, broadcast by itself
  TensorView t_out, t_lse;   // the shapes of out and lse

  // Whether scores have a derivative.
  FUSEDATTN_MEMBER bool scores_move() const { return t_q || t_k || t_bias; }
};

using AttentionKernels = KernelTable<AttentionForward, AttentionBackward>;
using AttentionJvpKernels = KernelTable<AttentionJvp>;

}  // namespace fusedattn
