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

constexpr int64_t most_vectors = 16;  // that a task has side by side
constexpr int64_t tile = 16;          // columns between two looks at the maximum

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

// Runs task(b, h, first row, vectors, last row) over blocks of neighbouring rows. The last vector
// of a block is moved back to where it is whole, over rows that are then computed twice alike.
template <class S, class Params, class Task>
void for_blocks(const Params& p, Task task) {
  const int64_t* shape = full_view(p).shape;
  const int64_t rows = shape[2], w = width<S>, outer = shape[0] * shape[1];
  const int threads = threads_for(p);
  const int64_t vectors = ceil_div(rows, w);
  const int64_t wanted = larger(int64_t(1), ceil_div(4 * threads, outer));
  const int64_t each = smaller(most_vectors, larger(int64_t(1), vectors / wanted));
  const int64_t blocks = ceil_div(vectors, each);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < outer * blocks; ++t) {
    const int64_t o = t / blocks, first = t % blocks * each * w;
    task(o / shape[1], o % shape[1], first, smaller(each, ceil_div(rows - first, w)), rows - w);
  }
}

// --- forward -------------------------------------------------------------------------------------

template <class T>
struct ForwardColumns {
  typedef compute_t<T> S;
  static constexpr int w = width<S>;
  static constexpr int degree = sizeof(T) == 2 ? 4 : 6;
  const SoftmaxForward& p;
  const Scores<T> scores{p};
  const int64_t width = p.width();
  const bool causal = p.options.causal != SoftmaxCausal::none;

  // The scores of rows i … i + w − 1 in column j.
  FUSEDATTN_MEMBER vec<S> load_scores(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const vec<S> lowest = splat(-infinity<S>);
    vec<S> s = load_as(p.x.at<const T>(b, h, i, j));
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
      // Row i + l sees column j from lane l on, where j < seen(i) + l.
      const int64_t blind = larger(int64_t(0), smaller(j + 1 - seen(i), int64_t(w)));
      s = select_below(int(blind), lowest, s);
    }
    return s;
  }

  // Columns that row i sees; negative where it sees none and rows after it see none either.
  FUSEDATTN_MEMBER int64_t seen(int64_t i) const {
    const int64_t diagonal =
        p.options.causal == SoftmaxCausal::bottom_right ? width - p.x.shape[2] : 0;
    return i + 1 + diagonal;
  }

  void block(int64_t b, int64_t h, int64_t first, int64_t vectors, int64_t last) const {
    alignas(64) S high[most_vectors * w], sum[most_vectors * w];
    for (int64_t k = 0; k < vectors * w; ++k) {
      high[k] = -infinity<S>;
      sum[k] = 0;
    }
    for (int64_t j = 0; j < width; j += tile)
      for (int64_t k = 0; k < vectors; ++k)
        absorb(b, h, smaller(first + k * w, last), j, smaller(j + tile, width), high + k * w,
               sum + k * w);
    for (int64_t k = 0; k < vectors * w; k += w) {
      const vec<S> m = load(high + k), l = load(sum + k);
      store(high + k, origin(m));
      store(sum + k, l == 0 ? vec<S>{} : 1 / l);
    }
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t k = 0; k < vectors; ++k) {
        const int64_t i = smaller(first + k * w, last);
        const vec<S> e = exponential(load_scores(b, h, i, j), load(high + k * w));
        store_as(p.out.at<T>(b, h, i, j), e * load(sum + k * w));
      }
    }
  }

 private:
  // A lane that has seen only −inf: −inf − 0 still has the exponential 0.
  FUSEDATTN_MEMBER vec<S> origin(vec<S> high) const {
    return high == -infinity<S> ? vec<S>{} : high;
  }

  FUSEDATTN_MEMBER vec<S> exponential(vec<S> s, vec<S> origin) const {
    return exp2<degree>((s - origin) * scores.factor);
  }

  FUSEDATTN_MEMBER void absorb(int64_t b, int64_t h, int64_t i, int64_t j0, int64_t j1, S* high,
                               S* sum) const {
    const vec<S> before = load(high);
    vec<S> m = before;
    for (int64_t j = j0; j < j1; ++j) m = maximum(load_scores(b, h, i, j), m);
    const vec<S> from = origin(m);
    vec<S> l = load(sum) * exponential(before, from);
    for (int64_t j = j0; j < j1; ++j) l += exponential(load_scores(b, h, i, j), from);
    store(high, m);
    store(sum, l);
  }
};

template <class T>
void forward_columns(const SoftmaxForward& p) {
  const ForwardColumns<T> columns{p};
  for_blocks<compute_t<T>>(p, [&](auto... where) { columns.block(where...); });
}

// --- backward ------------------------------------------------------------------------------------

template <class T>
struct BackwardColumns {
  typedef compute_t<T> S;
  static constexpr int w = width<S>;
  const SoftmaxBackward& p;

  void block(int64_t b, int64_t h, int64_t first, int64_t vectors, int64_t last) const {
    alignas(64) S row[most_vectors * w];
    for (int64_t k = 0; k < vectors * w; ++k) row[k] = 0;
    const int64_t width = p.width();
    for (int64_t j = 0; j < width; j += tile) {
      for (int64_t k = 0; k < vectors; ++k) {
        const int64_t i = smaller(first + k * w, last);
        vec<S> sum = load(row + k * w);
        for (int64_t c = j; c < smaller(j + tile, width); ++c)
          sum += load_as(p.dout.at<const T>(b, h, i, c)) * load_as(p.out.at<const T>(b, h, i, c));
        store(row + k * w, sum);
      }
    }
    const S scale = S(p.options.scale);
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t k = 0; k < vectors; ++k) {
        const int64_t i = smaller(first + k * w, last);
        const vec<S> dout = load_as(p.dout.at<const T>(b, h, i, j));
        const vec<S> ds = load_as(p.out.at<const T>(b, h, i, j)) * (dout - load(row + k * w));
        if (p.ds) store(p.ds.at<S>(b, h, i, j), ds);
        if (p.dx) store_as(p.dx.at<T>(b, h, i, j), ds * scale);
      }
    }
  }
};

template <class T>
void backward_columns(const SoftmaxBackward& p) {
  const BackwardColumns<T> columns{p};
  for_blocks<compute_t<T>>(p, [&](auto... where) { columns.block(where...); });
}

}  // namespace
}  // namespace fusedattn::FUSEDATTN_ISA
