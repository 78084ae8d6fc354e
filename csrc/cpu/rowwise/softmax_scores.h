// What the two layouts of softmax.cpp share: where a row lies, and its scores' scale and bias.
#pragma once

#include "rowwise.h"
#include "softmax.h"

namespace fusedattn::FUSEDATTN_ISA {
namespace {

FUSEDATTN_INLINE const TensorView& full_view(const SoftmaxForward& p) { return p.x; }
FUSEDATTN_INLINE const TensorView& full_view(const SoftmaxBackward& p) { return p.out; }

// Which row: batch, head, query.
struct Index {
  int64_t b = 0, h = 0, i = 0;

  template <class Params>
  FUSEDATTN_MEMBER void next(const Params& p) {
    const int64_t* shape = full_view(p).shape;
    if (++i < shape[2]) return;
    i = 0;
    if (++h < shape[1]) return;
    h = 0;
    ++b;
  }
};

template <class Params>
FUSEDATTN_INLINE Index index_of(const Params& p, int64_t row) {
  const int64_t* shape = full_view(p).shape;
  return {row / shape[2] / shape[1], row / shape[2] % shape[1], row % shape[2]};
}

// How many columns the causal diagonal leaves to query i.
template <class Params>
FUSEDATTN_INLINE int64_t seen_columns(const Params& p, int64_t i) {
  const int64_t *shape = full_view(p).shape, width = shape[3];
  switch (p.options.causal) {
    case SoftmaxCausal::top_left:
      return smaller(i + 1, width);
    case SoftmaxCausal::bottom_right:
      return larger(i + 1 + width - shape[2], int64_t(0));
    default:
      return width;
  }
}

// Scores are multiplier · x + bias, and `factor` leads from them to log2 units. Without a bias the
// multiplier is but the sign of the scale, so that a row's maximum is one of its numbers exactly.
template <class T>
struct Scores {
  typedef compute_t<T> S;
  const SoftmaxForward& p;
  const double scale = p.options.scale;
  const S multiplier = p.bias ? S(scale) : scale > 0 ? S(1) : scale < 0 ? S(-1) : S(scale);
  const S factor = p.bias || multiplier == 0 ? S(log2e) : clamp(scale * multiplier * log2e);

  // Runs f on the bias as a pointer to its own type, `offset` elements in.
  template <class F>
  FUSEDATTN_MEMBER auto with_bias(int64_t offset, F f) const {
    if constexpr (sizeof(S) == 8) {
      return f(static_cast<const double*>(p.bias.data) + offset);
    } else {
      if (p.bias.dtype == DType::f32) return f(static_cast<const float*>(p.bias.data) + offset);
      if (p.bias.dtype == DType::bf16) return f(static_cast<const bf16*>(p.bias.data) + offset);
      return f(static_cast<const f16*>(p.bias.data) + offset);
    }
  }

  // Neither 0 nor infinite in float, so that −inf stays −inf and 0 stays 0 under it.
  static S clamp(double factor) { return S(smaller(larger(factor, 1e-37), 3e38)); }

  // Columns [0, n) of a row of the bias, zeros up to `wide`.
  void load_bias(int64_t offset, int64_t n, S* row, int64_t wide) const {
    with_bias(offset, [&](auto* bias) { load_row(bias, p.bias.stride[3], n, row, wide); });
  }
};

// Elements at a stride, moved together or apart as they are.
template <class T>
FUSEDATTN_INLINE void gather(const T* from, int64_t stride, int64_t n, T* to) {
  for (int64_t j = 0; j < n; ++j) to[j] = from[j * stride];
}

template <class T>
FUSEDATTN_INLINE void scatter(const T* from, int64_t n, T* to, int64_t stride) {
  for (int64_t j = 0; j < n; ++j) to[j * stride] = from[j];
}

template <class T>
FUSEDATTN_INLINE void zero(T* p, int64_t stride, int64_t n) {
  if (stride == 1 && n > 0) {
    memset(p, 0, n * sizeof(T));
    return;
  }
  for (int64_t j = 0; j < n; ++j) put(p + j * stride, 0);
}

}  // namespace
}  // namespace fusedattn::FUSEDATTN_ISA
