// Softmax over rows that lie side by side in memory, as along any dimension of a contiguous tensor
// but its last: the lanes of a vector are neighbouring rows.
//
// The first pass keeps a running maximum and sum for each lane (online softmax), the second
// computes the exponentials anew: each number is read twice and written once, however long the rows
// are.
#pragma once

#include "softmax_scores.h"

namespace fusedattn::FUSEDATTN_ISA {
namespace {

// Columns between two looks at the maximum. At a stride of a power of two they share a set of L1.
constexpr int64_t tile = 8;
constexpr int64_t few_columns = 512;  // whose sum runs by itself: see in_short_sums

FUSEDATTN_INLINE bool mergeable(const TensorView& x, int d) {
  return !x || x.stride[d] == x.stride[d + 1] * x.shape[d + 1];
}

FUSEDATTN_INLINE void merge(TensorView& x, int d) {
  x.shape[d + 1] *= x.shape[d];
  for (int i = d; i > 0; --i) {
    x.shape[i] = x.shape[i - 1];
    x.stride[i] = x.stride[i - 1];
  }
  x.shape[0] = 1;
  x.stride[0] = 0;
}

FUSEDATTN_INLINE void swap_dimensions(TensorView& x, int d, int e) {
  const int64_t shape = x.shape[d], stride = x.stride[d];
  x.shape[d] = x.shape[e];
  x.stride[d] = x.stride[e];
  x.shape[e] = shape;
  x.stride[e] = stride;
}

// Rearranges the rows so that those side by side in memory are dimension 2; false where they are
// not, or are fewer than a vector. The causal diagonal counts dimension 2, which then stays.
template <int Count>
FUSEDATTN_INLINE bool side_by_side(TensorView* const (&views)[Count], int dense, bool causal,
                                   int64_t lanes) {
  for (TensorView* x : views)
    for (int d = 0; d < 4; ++d) x->shape[d] = views[0]->shape[d];
  if (!causal) {
    int unit = 2;
    for (int d = 0; d < 2; ++d)
      if (views[0]->stride[d] == 1 && views[0]->shape[d] > 1) unit = d;
    for (TensorView* x : views) swap_dimensions(*x, unit, 2);
    for (int d = 1; d >= 0;) {
      bool all = true;
      for (TensorView* x : views) all = all && mergeable(*x, d);
      if (all && views[0]->shape[d] > 1) {
        for (TensorView* x : views) merge(*x, d);
      } else {
        --d;
      }
    }
  }
  for (int i = 0; i < Count; ++i) {
    const TensorView& x = *views[i];
    if (x && x.stride[2] != 1 && (i < dense || x.stride[2] != 0)) return false;
  }
  return views[0]->shape[2] >= lanes;
}

FUSEDATTN_INLINE bool columns_of(SoftmaxForward& p, int64_t lanes) {
  TensorView* const views[] = {&p.x, &p.out, &p.mask, &p.bias};
  return side_by_side(views, 2, p.options.causal != SoftmaxCausal::none, lanes);
}

FUSEDATTN_INLINE bool columns_of(SoftmaxBackward& p, int64_t lanes) {
  TensorView* const views[] = {&p.out, &p.dout, &p.dx, &p.ds};
  return side_by_side(views, 4, p.options.causal != SoftmaxCausal::none, lanes);
}

// Runs block<N>(b, h, first row) over blocks of N vectors of neighbouring rows, N = 8 or, for what
// remains, 1. The last vector is moved back to where it is whole, over rows that are computed twice
// alike: by one thread, since they end one block.
template <class S, class Columns, class Params>
void for_blocks(const Params& p, const Columns& columns) {
  constexpr int64_t n = 8, w = width<S>;
  const int64_t* shape = full_view(p).shape;
  const int64_t rows = shape[2], outer = shape[0] * shape[1];
  const int64_t vectors = ceil_div(rows, w), blocks = ceil_div(vectors, n);
  const int threads = threads_for_elements(p.work());
  on_threads(threads, [&] {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < outer * blocks; ++t) {
      const int64_t b = t / blocks / shape[1], h = t / blocks % shape[1], v = t % blocks * n;
      if ((v + n) * w <= rows) {
        columns.template block<n>(b, h, v * w);
      } else {
        for (int64_t k = v; k < vectors; ++k)
          columns.template block<1>(b, h, smaller(k * w, rows - w));
      }
    }
  });
}

// --- forward -------------------------------------------------------------------------------------

template <class T>
struct ForwardColumns {
  typedef compute_t<T> S;
  static constexpr int w = width<S>;
  static constexpr int degree = exp2_degree<T>;
  const SoftmaxForward& p;
  const Scores<T> scores{p};
  const int64_t columns = p.width();
  const bool causal = p.options.causal != SoftmaxCausal::none;
  const bool plain = !p.bias && !p.mask && !causal && scores.multiplier == 1;

  // The scores of rows i … i + w − 1 in column j.
  FUSEDATTN_MEMBER vec<S> load_scores(int64_t b, int64_t h, int64_t i, int64_t j) const {
    vec<S> s = load_as(p.x.at<const T>(b, h, i, j));
    return plain ? s : adjust(s, b, h, i, j);
  }

  template <int N>
  void block(int64_t b, int64_t h, int64_t i) const {
    vec<S> high[N], sum[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      high[v] = splat(-infinity<S>);
      sum[v] = vec<S>{};
    }
    for (int64_t first = 0; first < columns; first += few_columns) {
      const int64_t end = smaller(first + few_columns, columns);
      vec<S> before[N], here[N] = {};
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) before[v] = high[v];
      for (int64_t j0 = first; j0 < end; j0 += tile)
        absorb<N>(b, h, i, j0, smaller(j0 + tile, end), high, here);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v)
        sum[v] = sum[v] * exponential(before[v], origin(high[v])) + here[v];
    }
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      high[v] = origin(high[v]);
      sum[v] = sum[v] == 0 ? vec<S>{} : 1 / sum[v];
    }
    for (int64_t j = 0; j < columns; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) {
        const vec<S> e = exponential(load_scores(b, h, i + v * w, j), high[v]);
        store_as(p.out.at<T>(b, h, i + v * w, j), e * sum[v]);
      }
    }
  }

 private:
  vec<S> adjust(vec<S> s, int64_t b, int64_t h, int64_t i, int64_t j) const {
    const vec<S> lowest = splat(-infinity<S>);
    if (scores.multiplier != 1) s *= scores.multiplier;
    if (p.bias) {
      s += scores.with_bias(p.bias.offset(b, h, i, j), [&](auto* bias) {
        return p.bias.stride[2] == 1 ? load_as(bias) : splat(S(to_float(*bias)));
      });
    }
    if (p.mask) {
      const uint8_t* mask = p.mask.at<const uint8_t>(b, h, i, j);
      if (p.mask.stride[2] == 1)
        s = select_bytes<S>(mask, s, lowest);
      else if (!*mask)
        s = lowest;
    }
    if (causal) {
      // Row i + l sees what is left of column i + l + 1 + diagonal: lanes from j − i − diagonal on.
      const int64_t diagonal =
          p.options.causal == SoftmaxCausal::bottom_right ? columns - p.x.shape[2] : 0;
      const int64_t blind = larger(int64_t(0), smaller(j - i - diagonal, int64_t(w)));
      s = select_below(int(blind), lowest, s);
    }
    return s;
  }

  // A lane that has seen only −inf: −inf − 0 still has the exponential 0.
  FUSEDATTN_MEMBER vec<S> origin(vec<S> high) const {
    return high == -infinity<S> ? vec<S>{} : high;
  }

  FUSEDATTN_MEMBER vec<S> exponential(vec<S> s, vec<S> origin) const {
    return exp2<degree>((s - origin) * scores.factor);
  }

  // Columns [j0, j1) into the maximum and the sum of each lane.
  template <int N>
  FUSEDATTN_MEMBER void absorb(int64_t b, int64_t h, int64_t i, int64_t j0, int64_t j1,
                               vec<S> (&high)[N], vec<S> (&sum)[N]) const {
    vec<S> before[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) before[v] = high[v];
    for (int64_t j = j0; j < j1; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) high[v] = maximum(load_scores(b, h, i + v * w, j), high[v]);
    }
    vec<S> here[N] = {};
    for (int64_t j = j0; j < j1; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v)
        here[v] += exponential(load_scores(b, h, i + v * w, j), origin(high[v]));
    }
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) sum[v] = sum[v] * exponential(before[v], origin(high[v])) + here[v];
  }
};

template <class T>
void forward_columns(const SoftmaxForward& p) {
  for_blocks<compute_t<T>>(p, ForwardColumns<T>{p});
}

// --- backward ------------------------------------------------------------------------------------

template <class T>
struct BackwardColumns {
  typedef compute_t<T> S;
  static constexpr int w = width<S>;
  const SoftmaxBackward& p;

  template <int N>
  void block(int64_t b, int64_t h, int64_t i) const {
    const int64_t columns = p.width();
    const int64_t dout_step = p.dout.stride[3], out_step = p.out.stride[3];
    const T* dout = p.dout.at<const T>(b, h, i);
    const T* out = p.out.at<const T>(b, h, i);
    vec<S> row[N] = {};
    for (int64_t first = 0; first < columns; first += few_columns) {
      vec<S> here[N] = {};
      for (int64_t j = first; j < smaller(first + few_columns, columns); ++j) {
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v)
          here[v] += load_as(dout + j * dout_step + v * w) * load_as(out + j * out_step + v * w);
      }
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) row[v] += here[v];
    }
    const auto write = [&](auto* to, int64_t step, S scale) {
      for (int64_t j = 0; j < columns; ++j) {
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) {
          const vec<S> y = load_as(out + j * out_step + v * w);
          const vec<S> d = load_as(dout + j * dout_step + v * w) - row[v];
          store_as(to + j * step + v * w, y * d * scale);
        }
      }
    };
    if (p.ds) write(p.ds.at<S>(b, h, i), p.ds.stride[3], S(1));
    if (p.dx) write(p.dx.at<T>(b, h, i), p.dx.stride[3], S(p.options.scale));
  }
};

template <class T>
void backward_columns(const SoftmaxBackward& p) {
  for_blocks<compute_t<T>>(p, BackwardColumns<T>{p});
}

}  // namespace
}  // namespace fusedattn::FUSEDATTN_ISA
