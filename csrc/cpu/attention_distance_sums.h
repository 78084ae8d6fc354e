// The gradient of a bias of distances: ds summed along its diagonals, in the pass of the others.
//
// Each (sequence, head) has sums of its own, and so has each split of its keys, two rows at a time:
// those of even and of odd queries, so that what one row adds does not wait for what the row above
// has stored one element farther. Afterwards all are added up in a fixed order.
#pragma once

#include "attention_tile.h"

namespace fusedattn::FUSEDATTN_ISA {

template <class S>
class DistanceSums {
  static constexpr int64_t beyond = 4 * width<S>;  // written to with zeros, past the keys of a row
  const AttentionBackward& f;
  const TensorView& out;
  const int64_t splits, of_head;
  S* sums = nullptr;  // (splits, heads, 2, of_head)

 public:
  DistanceSums(const AttentionBackward& f, int64_t splits)
      : f(f),
        out(f.ddistance_bias),
        splits(splits),
        of_head((f.cu_seqlens_q ? f.longest_q() + f.longest_k()
                                : f.batch() * (f.longest_q() + f.longest_k())) +
                f.sequences() * beyond) {}

  explicit operator bool() const { return bool(out); }
  void take(Arena& arena) {
    if (out) sums = arena.take<S>(splits * f.heads() * 2 * of_head);
  }

  // Where keys j of query i of head h of sequence b add to, at row(…) + j.
  S* row(int64_t split, int64_t b, int64_t h, const Sequence<int64_t>& sequence, int64_t i) const {
    return of(split, b, h, i & 1) + sequence.seq_q - 1 - i;
  }

  void clear(int64_t split, int64_t b, int64_t h, const Sequence<int64_t>& sequence) const {
    for (int64_t odd = 0; odd < 2; ++odd)
      memset(of(split, b, h, odd), 0,
             (sequence.seq_q + sequence.rows_k() + beyond) * int64_t(sizeof(S)));
  }

  // One for each row (B or 1, Hq or 1) of the gradient, after all sums.
  int64_t tasks() const { return out ? out.shape[0] * out.shape[1] : 0; }
  void write(int64_t task) const {
    const int64_t own_b = task / out.shape[1], own_h = task % out.shape[1];
    const bool over_batch = out.shape[0] == 1, over_heads = out.shape[1] == 1;
    for (int64_t at = 0; at < out.shape[3]; ++at) {
      double total = 0;
      for (int64_t b = over_batch ? 0 : own_b; b < (over_batch ? f.sequences() : own_b + 1); ++b) {
        const Sequence<int64_t> sequence = f.sequence(b);
        const int64_t place = at - (f.longest_k() - sequence.rows_k());
        if (place < 0 || place >= sequence.seq_q + sequence.rows_k() - 1) continue;
        for (int64_t h = over_heads ? 0 : own_h; h < (over_heads ? f.heads() : own_h + 1); ++h)
          for (int64_t split = 0; split < splits; ++split)
            total += double(of(split, b, h, 0)[place]) + double(of(split, b, h, 1)[place]);
      }
      *out.at<S>(own_b, own_h, 0, at) = S(total);
    }
  }

 private:
  S* of(int64_t split, int64_t b, int64_t h, int64_t odd) const {
    const int64_t before =
        f.cu_seqlens_q ? f.packed_q(b) + f.packed_k(b) : b * (f.longest_q() + f.longest_k());
    return sums + ((split * f.heads() + h) * 2 + odd) * of_head + before + b * beyond;
  }
};

}  // namespace fusedattn::FUSEDATTN_ISA
