// The gradient of attention's bias in the pass of dk and dv, which has ds at hand: a fragment, keys
// × queries, at a time. It is stored where each element gets one ds, else added in fp32: by atomics
// for what a batch or heads share, in any order. Of one column the keys of a warp are added before;
// of one row a lane keeps the sums of its keys over all queries of a head. Where the order has to
// be the same each time dbias has a kernel of its own: attention_backward_bias.cuh.
#pragma once

#include "attention_backward_scale.cuh"
#include "attention_scores.cuh"

namespace fusedattn::cuda {

struct BiasSums {
  TensorView to;  // dbias, or fp32 sums of its shape, zeros at first; absent: nowhere
  bool adds;      // several ds to an element

  FUSEDATTN_DEVICE bool one_row() const { return adds && to.shape[2] == 1; }
  FUSEDATTN_DEVICE bool one_column() const { return adds && to.shape[3] == 1; }
};

// Of one row: what a lane has of its m · 16 keys, less than a factor.
template <int m>
using KeySums = Pack<float, 2>[m];

template <int m>
FUSEDATTN_DEVICE void clear(KeySums<m>& sums) {
#pragma unroll
  for (int k = 0; k < m; ++k) sums[k] = {0.0f, 0.0f};
}

// To dbias, which is fp32 or as q.
template <class T>
FUSEDATTN_DEVICE void store_bias(const TensorView& to, int b, int h, int i, int j, float x) {
  if (to.dtype == DType::f32)
    store(to.at<float>(b, h, i, j), x);
  else
    store(to.at<T>(b, h, i, j), from_float<T>(x));
}

// Fragments of head (b, h): ds times `inverse`, of queries i and keys j.
template <class T>
FUSEDATTN_DEVICE void add_bias_gradient(const AttentionForward& p, const BiasSums& sums, int b,
                                        int h, Pack<float, 4> ds, float inverse, int i, int j) {
#pragma unroll
  for (int e = 0; e < 4; ++e) ds[e] *= inverse;
  const bool column = sums.one_column();
  if (column) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      ds[e] += ds[e + 2];
#pragma unroll
      for (int apart = 4; apart < warp_size; apart *= 2) ds[e] += shuffle_xor(ds[e], apart);
    }
    if (lane() >= 4) return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int query = i + query_step<true>(e), key = j + key_step<true>(e);
    if (column && e >= 2) continue;
    if (!below(query, p.longest_q()) || !below(key, p.longest_k())) continue;
    if (sums.adds)
      atomic_add(sums.to.at<float>(b, h, query, key), ds[e]);
    else
      store_bias<T>(sums.to, b, h, query, key, ds[e]);
  }
}

// What the lanes of a warp have of a head (b, h), of keys from `key` on.
template <int m>
FUSEDATTN_DEVICE void add_key_sums(const AttentionForward& p, const BiasSums& sums, int b, int h,
                                   const KeySums<m>& of_keys, float inverse, int key) {
  const bool column = sums.one_column();
#pragma unroll
  for (int k = 0; k < m; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = of_keys[k][half] * inverse;
#pragma unroll
      for (int apart = 1; apart < 4; apart *= 2) sum += shuffle_xor(sum, apart);
      if (column)
#pragma unroll
        for (int apart = 4; apart < warp_size; apart *= 2) sum += shuffle_xor(sum, apart);
      const int j = key + 16 * k + row_of(2 * half);
      if (lane() % (column ? warp_size : 4) == 0 && below(j, p.longest_k()))
        atomic_add(sums.to.at<float>(b, h, 0, j), sum);
    }
}

}  // namespace fusedattn::cuda
