// What keeps ds in the range of fp16, as which the products ds · k and dsᵀ · q take it. The kernels
// work with e · ds and divide dk and dq by e, a power of two for each head of keys. Since
// p (1 − p) ≤ ¼ and out is a mean of values, |ds| is at most
//
//   ½ · max ‖dout_i‖ · max ‖v_j‖ + max |dlse_i|
//
// (Cauchy and Schwarz; dropout multiplies the first term as it does the weights), and e is the
// largest up to 1 with which that stays below 2¹⁵. To scale is exact but for what falls below the
// normal numbers, 2⁻²⁹ of the bound.
//
// attention_backward_norms finds the three maxima, before all else; of them
// attention_backward_rows makes e. bf16 reaches as far as fp32 and has nothing of this.
#pragma once

#include <bit>

#include "attention_common.cuh"

namespace fusedattn::cuda {

template <class T>
constexpr bool scales_ds = std::is_same_v<T, f16>;

// e of a head of B · Hq. Read each time it is asked for, to stay in no register.
template <class T, class P>
FUSEDATTN_DEVICE float ds_scale(const P& p, uint32_t head) {
  if constexpr (scales_ds<T>)
    return load(p.ds_scales + uint32_t(anew(int(head))));
  else
    return 1.0f;
}

// 1 / e
template <class T, class P>
FUSEDATTN_DEVICE float inverse_ds_scale(const P& p, uint32_t head) {
  if constexpr (scales_ds<T>)
    return std::bit_cast<float>(0x7f000000 - std::bit_cast<uint32_t>(ds_scale<T>(p, head)));
  else
    return 1.0f;
}

// What makes dq or dk of the sum of e · ds · k or e · dsᵀ · q.
template <class T, class P>
FUSEDATTN_DEVICE float gradient_scale(const P& p, uint32_t head) {
  return p.rules.scale * inverse_ds_scale<T>(p, head);
}

// e · (dp − Δ), from e · Δ.
template <class T>
FUSEDATTN_DEVICE float less_delta(float dp, float delta, float scale) {
  return scales_ds<T> ? fma(dp, scale, -delta) : dp - delta;
}

// --- from the maxima to e ------------------------------------------------------------------------

constexpr int norms_of_head = 3;  // max ‖v_j‖², max ‖dout_i‖², max |dlse_i|

FUSEDATTN_DEVICE float ds_scale_from(const float* norms, float keep_scale) {
  const float bound = fma(0.5f * keep_scale, sqrt(load(norms) * load(norms + 1)), load(norms + 2));
  const uint32_t exponent = std::bit_cast<uint32_t>(bound) >> 23;  // bound < 2^(exponent − 126)
  return std::bit_cast<float>((exponent > 141 ? 268 - exponent : 127) << 23);
}

// --- the maxima ----------------------------------------------------------------------------------

constexpr int norms_threads = 256, norms_team = 8;  // threads of a row
constexpr int norms_rows = norms_threads / norms_team;

// By a team; 0 where there is no row.
template <class T>
FUSEDATTN_DEVICE float square_of(const T* row, int64_t width) {
  constexpr int N = pack_size<T>;
  float sum = 0.0f;
  if (row != nullptr)
    for (int64_t c = thread() % norms_team * N; c < width; c += norms_team * N) {
      const auto x = widen(load<N>(row + c));
#pragma unroll
      for (int e = 0; e < N; ++e) sum = fma(x[e], x[e], sum);
    }
#pragma unroll
  for (int apart = norms_team / 2; apart > 0; apart /= 2) sum += shuffle_xor(sum, apart);
  return sum;
}

// By a warp, one number of each team. What is not finite does not count.
FUSEDATTN_DEVICE void raise(float* maximum, float x) {
  if (!(x < INFINITY)) x = 0.0f;
#pragma unroll
  for (int apart = warp_size / 2; apart >= norms_team; apart /= 2) {
    const float other = shuffle_xor(x, apart);
    x = other > x ? other : x;
  }
  if (lane() == 0) atomic_max(maximum, x);
}

inline int64_t norms_blocks(const AttentionBackward& p) {
  return p.batch() * (p.heads_kv() * ceil_div(p.longest_k(), norms_rows) +
                      p.heads() * ceil_div(p.longest_q(), norms_rows));
}

template <class T, class P>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(norms_threads, 4)
    attention_backward_norms(const FUSEDATTN_GRID_CONSTANT P p) {
  const int64_t tiles_k = ceil_div(p.longest_k(), norms_rows);
  const int64_t of_values = p.batch() * p.heads_kv() * tiles_k;  // the first blocks
  const int row = thread() / norms_team;
  if (block() < of_values) {
    const int64_t head = block() / tiles_k, j = (block() - head * tiles_k) * norms_rows + row;
    const int64_t b = head / p.heads_kv(), h = head - b * p.heads_kv();
    const int keys = present(p.cu_seqlens_k)
                         ? packed_row(p.cu_seqlens_k, int(p.sequences()), p.longest_k())
                         : sequence_of<false>(p, b).seq_k;
    const T* v = j < keys ? p.v.template at<T>(b, h, j) : nullptr;
    raise(p.norms + norms_of_head * head, square_of(v, p.head_dim_v()));
    return;
  }
  const int64_t tiles = ceil_div(p.longest_q(), norms_rows), at = block() - of_values;
  const int64_t head = at / tiles, i = (at - head * tiles) * norms_rows + row;
  const int64_t b = head / p.heads(), h = head - b * p.heads();
  float* norms = p.norms + norms_of_head * (head / p.group());
  const bool sees = i < p.longest_q() && load(p.lse.template at<float>(b, h, i)) != -INFINITY;
  if (present(p.dout)) {
    const T* dout = sees ? p.dout.template at<T>(b, h, i) : nullptr;
    raise(norms + 1, square_of(dout, p.head_dim_v()));
  }
  if (present(p.dlse)) {
    const float dlse = sees ? load(p.dlse.template at<float>(b, h, i)) : 0.0f;
    raise(norms + 2, dlse < 0.0f ? -dlse : dlse);
  }
}

}  // namespace fusedattn::cuda
