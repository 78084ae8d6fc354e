// The gradient of a bias, summed in the pass that makes the others: ds is there as it is.
//
// No two threads may add to one element, and sums need an order. So a thread takes all the (batch,
// key head) pairs that share a part of the bias, one after the other, and sums in memory of its
// own. What does not go in this way is for attention_bias_grad.h: a bias that is broadcast along
// queries or keys, or over both batch and heads; one that is too large; more addends than S sums.
#pragma once

#include "attention_tile.h"

namespace fusedattn::FUSEDATTN_ISA {

template <class S>
class BiasSums {
  static constexpr int64_t most_addends = 64, most_bytes = int64_t{64} << 20;
  const AttentionBackward& f;
  const bool over_batch, over_heads;  // what it is broadcast over
  const int64_t slices, rows, ld;     // of what a thread sums at a time: (slices, rows, ld)
  const bool used;

 public:
  BiasSums(const AttentionBackward& f, int threads)
      : f(f),
        over_batch(f.dbias.shape[0] == 1 && f.batch() > 1),
        over_heads(f.dbias.shape[1] == 1 && f.heads() > 1),
        slices(over_heads ? 1 : f.group()),
        rows(round_up(f.longest_q(), 2)),
        ld(round_up(f.longest_k(), 2 * width<S>)),
        used(f.dbias && !(over_batch && over_heads) && f.dbias.shape[2] == f.longest_q() &&
             f.dbias.shape[3] == f.longest_k() && addends() <= most_addends && parts() >= threads &&
             threads * size() * int64_t(sizeof(S)) <= most_bytes) {}

  explicit operator bool() const { return used; }
  int64_t size() const { return slices * rows * ld; }

  // The pairs of a unit share a part of the bias, those of two units do not. Without a bias each
  // pair is one.
  int64_t units() const { return used ? parts() : pairs(); }
  int64_t pairs_of_unit() const { return pairs() / units(); }
  int64_t pair(int64_t unit, int64_t n) const {
    return over_batch && used ? n * f.heads_kv() + unit : unit * pairs_of_unit() + n;
  }

  // The sums of query i of head g of the group.
  S* row(S* sums, int64_t g, int64_t i) const {
    return sums + ((over_heads ? 0 : g) * rows + i) * ld;
  }

  void clear(S* sums) const { memset(sums, 0, size() * sizeof(S)); }
  void write(int64_t unit, S* sums) const {
    const int64_t first = pair(unit, 0), b = over_batch ? 0 : first / f.heads_kv();
    const int64_t h = over_heads ? 0 : first % f.heads_kv() * f.group();
    for (int64_t g = 0; g < slices; ++g)
      for (int64_t i = 0; i < f.longest_q(); ++i)
        with_float_type<S>(f.dbias.dtype, [&]<class B>(B) {
          store_row(f.dbias.at<B>(b, h + g, i), f.dbias.stride[3], f.longest_k(), row(sums, g, i),
                    S(1));
        });
  }

 private:
  int64_t pairs() const { return f.sequences() * f.heads_kv(); }
  int64_t parts() const { return over_batch ? f.heads_kv() : over_heads ? f.batch() : pairs(); }
  int64_t addends() const { return over_batch ? f.batch() : over_heads ? f.heads() : 1; }
};

}  // namespace fusedattn::FUSEDATTN_ISA
