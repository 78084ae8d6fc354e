// Softmax over rows, which lie along memory or side by side.
//
// A row of up to `chunk` columns is read once: its exponentials wait in L1 until their sum is
// known. A wider row is a series of chunks, each with its own maximum and sum (Milakov and
// Gimelshein 2018), that threads may share; they are combined in order, so that neither the number
// of threads nor trailing columns that are masked change a bit of the result.
#include "softmax_columns.h"
#include "softmax_short.h"
#include "workspace.h"

namespace fusedattn::FUSEDATTN_ISA {
namespace {

constexpr int64_t chunk = 8192;

// --- forward -------------------------------------------------------------------------------------

// The largest of n numbers; a NaN is passed over, and shows in the sum.
template <class T>
FUSEDATTN_INLINE compute_t<T> highest(const T* x, int64_t n, bool ahead) {
  typedef compute_t<T> S;
  constexpr int w = width<S>;
  vec<S> high[unroll];
  for (auto& each : high) each = splat(-infinity<S>);
  int64_t i = 0;
  if constexpr (std::is_same_v<T, bf16>) {
    for (; i + unroll * w <= n; i += unroll * w) {
      if (ahead) [[unlikely]]
        fetch_ahead(x + i, unroll * w, prefetch);
#pragma GCC unroll 2
      for (int v = 0; v < unroll; v += 2) {
        vec<S> a, b;
        get_pair<S>(x + i + v * w, a, b);
        high[v] = maximum(a, high[v]);
        high[v + 1] = maximum(b, high[v + 1]);
      }
    }
  }
  for_vectors<S>(n - i, [&](int v, int64_t j, auto left) {
    if (v == 0 && ahead) [[unlikely]]
      fetch_ahead(x + i + j, unroll * w, prefetch);
    high[v] = maximum(load_some(x + i + j, left, -infinity<S>), high[v]);
  });
  return reduce_max(maximum(maximum(high[0], high[1]), maximum(high[2], high[3])));
}

// e = 2^exponent(x), with room for whole vectors; returns their sum. Fetches the row at `next`.
template <int Degree, class T, class Exponent, class Next = T>
FUSEDATTN_INLINE compute_t<T> exponentials(const T* x, int64_t n, const Exponent& exponent,
                                           compute_t<T>* e, const Next* next = nullptr) {
  typedef compute_t<T> S;
  vec<S> sums[unroll] = {};
  for_vectors<S>(n, [&](int v, int64_t j, auto left) {
    if (v == 0 && next) fetch_lines(next + j, unroll * width<S>, prefetch);
    const vec<S> y = exp2<Degree>(exponent(load_some(x + j, left, -infinity<S>)));
    store(e + j, y);
    sums[v] += y;
  });
  return reduce_add(sum_of(sums));
}

// out = inverse · e.
template <class T, class S = compute_t<T>>
FUSEDATTN_INLINE void scaled(const S* e, int64_t n, S inverse, bool streamed, T* out) {
  constexpr int w = width<S>;
  const auto value = [=](int64_t j, Whole) { return load(e + j) * inverse; };
  int64_t i = streamed ? stream_vectors<S>(out, n, value) : 0;
  if constexpr (std::is_same_v<T, bf16>) {
    for (; i + 2 * w <= n; i += 2 * w)
      set_pair<S>(out + i, load(e + i) * inverse, load(e + i + w) * inverse);
  }
  for_vectors<S>(n - i, [=](int, int64_t j, auto left) {
    store_some(out + i + j, left, load(e + i + j) * inverse);
  });
}

// The largest score of a chunk and the sum of its exponentials relative to that.
template <class S>
struct Part {
  S high, sum;
};

template <class T>
struct ForwardRows {
  typedef T Element;
  typedef compute_t<T> S;
  static constexpr int degree = exp2_degree<T>;
  const SoftmaxForward& p;
  const Scores<T> scores{p};
  const bool direct = !p.bias && (!p.mask || p.mask.stride[3] == 0) && scores.multiplier == 1 &&
                      p.x.stride[3] == 1;  // the scores are x as it lies
  const bool large = outgrows_caches(1, threads_for_elements(p.work()), p.work(), p.x, p.out);
  const int64_t on = p.x.stride[2] * rows_on((large || last_cache_is_far()) && p.x.stride[3] == 1,
                                             p.rows(), p.width() * int64_t(sizeof(T)));

  // Columns that the row may see; what is masked in between is no less computed.
  int64_t visible(const Index& at) const {
    if (p.mask && p.mask.stride[3] == 0 && !*p.mask.at<const uint8_t>(at.b, at.h, at.i)) return 0;
    return seen_columns(p, at.i);
  }

  // Runs f on the scores of columns [j0, j0 + n), which are x itself or else in e.
  template <class F>
  FUSEDATTN_MEMBER auto with_scores(const Index& at, int64_t j0, int64_t n, S* e, F f) const {
    if (direct) return f(p.x.at<const T>(at.b, at.h, at.i, j0));
    prepare(at, j0, n, e);
    return f(const_cast<const S*>(e));
  }

  // e = the exponentials of scores x relative to their own maximum, of a row or of a part; fetches
  // the row at `next`.
  template <class X>
  S exponentiate_row(const X* x, int64_t n, S high, S* e, const T* next) const {
    return with_exponent<T>(finite_origin(high), scores.factor, [&](const auto& exponent) {
      return exponentials<degree>(x, n, exponent, e, next);
    });
  }
  template <class X>
  S exponentiate_part(const X* x, int64_t n, S high, S* e) const {
    return exponentials<degree>(x, n, exponent_of(finite_origin(high), scores.factor), e);
  }

  void write(const Index& at, int64_t j0, int64_t n, const S* e, S inverse) const {
    T* out = p.out.at<T>(at.b, at.h, at.i, j0);
    if (p.out.stride[3] != 1) {
      store_row(out, p.out.stride[3], n, e, inverse);
      return;
    }
    scaled<T>(e, n, inverse, large, out);
  }

  void write_zeros(const Index& at, int64_t j0, int64_t j1) const {
    zero(p.out.at<T>(at.b, at.h, at.i, j0), p.out.stride[3], j1 - j0);
  }

  // Nothing but rows of x, each along memory: what most calls are.
  bool plain() const {
    return direct && !p.mask && p.out.stride[3] == 1 && p.options.causal == SoftmaxCausal::none;
  }

  void plain_row(const Index& at, S* e) const {
    const int64_t n = p.width();
    const T* x = p.x.at<const T>(at.b, at.h, at.i);
    T* out = p.out.at<T>(at.b, at.h, at.i);
    const S high = highest(x, n, large && !on);
    const S sum = exponentiate_row(x, n, high, e, on ? x + on : nullptr);
    scaled<T>(e, n, reciprocal(sum), large, out);
  }

  template <int Vectors>
  void short_row(const Index& at, const ShortRow<T, Vectors>& row) const {
    row.template forward<degree>(p.x.at<const T>(at.b, at.h, at.i), on, scores.factor, large,
                                 p.out.at<T>(at.b, at.h, at.i));
  }

  void narrow(const Index& at, S* e) const {
    const int64_t n = visible(at);
    const T* const next = on ? p.x.at<const T>(at.b, at.h, at.i) + on : nullptr;
    const S sum = with_scores(at, 0, n, e, [&](auto* x) {
      return exponentiate_row(x, n, highest(x, n, direct && large && !on), e, next);
    });
    write(at, 0, n, e, reciprocal(sum));
    write_zeros(at, n, p.width());
  }

  Part<S> part(const Index& at, int64_t c, S* e) const {
    const int64_t n = smaller(visible(at) - c * chunk, chunk);
    if (n <= 0) return {-infinity<S>, 0};
    return with_scores(at, c * chunk, n, e, [&](auto* x) -> Part<S> {
      const S high = highest(x, n, direct && large);
      return {high, exponentiate_part(x, n, high, e)};
    });
  }

  Part<S> combine(const Part<S>* parts, int64_t count) const {
    Part<S> row{-infinity<S>, 0};
    for (int64_t c = 0; c < count; ++c) row.high = larger(row.high, parts[c].high);
    for (int64_t c = 0; c < count; ++c) row.sum += parts[c].sum * carried(parts[c].high, row.high);
    return row;
  }

  void finish(const Index& at, int64_t c, const Part<S>& row, S* e) const {
    const int64_t j0 = c * chunk, end = smaller(p.width() - j0, chunk);
    const int64_t n = larger(smaller(visible(at) - j0, chunk), int64_t(0));
    if (n > 0) {
      with_scores(at, j0, n, e, [&](auto* x) { exponentiate_part(x, n, row.high, e); });
      write(at, j0, n, e, reciprocal(row.sum));
    }
    write_zeros(at, j0 + n, j0 + end);
  }

 private:
  S carried(S high, S highest) const {
    return exp2<6>(splat((high - finite_origin(highest)) * scores.factor))[0];
  }

  // e[j] = the score, −inf where masked; whole vectors.
  void prepare(const Index& at, int64_t j0, int64_t n, S* e) const {
    const int64_t wide = round_up(n, width<S>);
    load_row(p.x.at<const T>(at.b, at.h, at.i, j0), p.x.stride[3], n, e, wide);
    if (p.bias) {
      alignas(64) S bias[chunk];
      scores.load_bias(p.bias.offset(at.b, at.h, at.i, j0), n, bias, wide);
      for (int64_t j = 0; j < n; j += width<S>)
        store(e + j, load(e + j) * scores.multiplier + load(bias + j));
    } else if (scores.multiplier != 1) {
      for (int64_t j = 0; j < n; j += width<S>) store(e + j, load(e + j) * scores.multiplier);
    }
    if (p.mask) apply_mask(p.mask.at<const uint8_t>(at.b, at.h, at.i, j0), n, e);
    for (int64_t j = n; j < wide; ++j) e[j] = -infinity<S>;
  }

  void apply_mask(const uint8_t* mask, int64_t n, S* e) const {
    constexpr int w = width<S>;
    const int64_t stride = p.mask.stride[3];
    int64_t j = 0;
    if (stride == 1) {
      for (; j + w <= n; j += w)
        store(e + j, select_bytes<S>(mask + j, load(e + j), splat(-infinity<S>)));
    }
    for (; j < n; ++j)
      if (!mask[j * stride]) e[j] = -infinity<S>;
  }
};

// --- backward ------------------------------------------------------------------------------------

// d = scale · out ∘ (dout − row).
template <class T, class Out, class S, class Fetch>
FUSEDATTN_INLINE void gradient_of_row(const T* dout, const T* out, int64_t n, S row, S scale,
                                      bool streamed, const Fetch& fetch, Out* d) {
  const auto value = [=](int64_t j, auto left) {
    return load_some(out + j, left, S(0)) * (load_some(dout + j, left, S(0)) * scale - row * scale);
  };
  const int64_t i = streamed ? stream_vectors<S>(d, n, value, fetch) : 0;
  for_vectors<S>(n - i, [=](int v, int64_t j, auto left) {
    if (v == 0) fetch(i + j, unroll * width<S>);
    store_some(d + i + j, left, value(i + j, left));
  });
}

template <class T, class Out, class S>
FUSEDATTN_INLINE void gradient(const T* dout, const T* out, int64_t n, S row, S scale,
                               bool streamed, On on, Out* d) {
  if (on.out == 0) return gradient_of_row(dout, out, n, row, scale, streamed, FetchNothing{}, d);
  const auto fetch = [=](int64_t j, int count) {
    fetch_lines(dout + on.dout + j, count, prefetch);
    fetch_lines(out + on.out + j, count, prefetch);
  };
  gradient_of_row(dout, out, n, row, scale, streamed, fetch, d);
}

template <class T>
struct BackwardRows {
  typedef T Element;
  typedef compute_t<T> S;
  const SoftmaxBackward& p;
  const S scale = S(p.options.scale);
  const bool direct = p.dout.stride[3] == 1 && p.out.stride[3] == 1;
  const bool large =
      outgrows_caches(1, threads_for_elements(p.work()), p.work(), p.dout, p.out, p.dx, p.ds);
  const int64_t rows = rows_on((large || last_cache_is_far()) && direct && p.width() <= chunk,
                               p.rows(), p.width() * int64_t(sizeof(T)));
  const On on{rows * p.dout.stride[2], rows * p.out.stride[2]};

  int64_t visible(const Index& at) const { return seen_columns(p, at.i); }

  // Runs f(dout, out) on columns [j0, j0 + n), in copies where they do not lie side by side.
  template <class F>
  FUSEDATTN_MEMBER auto with_columns(const Index& at, int64_t j0, int64_t n, S* space, F f) const {
    const T* dout = p.dout.at<const T>(at.b, at.h, at.i, j0);
    const T* out = p.out.at<const T>(at.b, at.h, at.i, j0);
    if (direct) return f(dout, out);
    T* copy = reinterpret_cast<T*>(space);
    gather(dout, p.dout.stride[3], n, copy);
    gather(out, p.out.stride[3], n, copy + chunk);
    return f(const_cast<const T*>(copy), const_cast<const T*>(copy + chunk));
  }

  S sum(const Index& at, int64_t j0, int64_t n, S* space) const {
    return with_columns(at, j0, n, space, [&](const T* dout, const T* out) {
      return dot(dout, out, n, direct && large && !rows);
    });
  }

  // ds = out ∘ (dout − row) and dx = scale · ds.
  void write(const Index& at, int64_t j0, int64_t n, S row, S* space) const {
    T* dx = p.dx ? p.dx.at<T>(at.b, at.h, at.i, j0) : nullptr;
    with_columns(at, j0, n, space, [&](const T* dout, const T* out) {
      if (p.ds) gradient(dout, out, n, row, S(1), large, {}, p.ds.at<S>(at.b, at.h, at.i, j0));
      if (!dx) return;
      if (p.dx.stride[3] == 1) {
        gradient(dout, out, n, row, scale, large, on, dx);
        return;
      }
      alignas(64) T apart[chunk];
      gradient(dout, out, n, row, scale, false, {}, apart);
      scatter(apart, n, dx, p.dx.stride[3]);
    });
  }

  void write_zeros(const Index& at, int64_t j0, int64_t j1) const {
    if (p.dx) zero(p.dx.at<T>(at.b, at.h, at.i, j0), p.dx.stride[3], j1 - j0);
    if (p.ds) zero(p.ds.at<S>(at.b, at.h, at.i, j0), p.ds.stride[3], j1 - j0);
  }

  bool plain() const {
    return direct && p.dx && p.dx.stride[3] == 1 && !p.ds &&
           p.options.causal == SoftmaxCausal::none;
  }

  void plain_row(const Index& at, S*) const {
    const int64_t n = p.width();
    const T* dout = p.dout.at<const T>(at.b, at.h, at.i);
    const T* out = p.out.at<const T>(at.b, at.h, at.i);
    const S row = dot(dout, out, n, large && !rows);
    gradient(dout, out, n, row, scale, large, on, p.dx.at<T>(at.b, at.h, at.i));
  }

  template <int Vectors>
  void short_row(const Index& at, const ShortRow<T, Vectors>& row) const {
    row.backward(p.dout.at<const T>(at.b, at.h, at.i), p.out.at<const T>(at.b, at.h, at.i), on,
                 scale, large, p.dx.at<T>(at.b, at.h, at.i));
  }

  void narrow(const Index& at, S* copy) const {
    const int64_t n = visible(at);
    write(at, 0, n, sum(at, 0, n, copy), copy);
    write_zeros(at, n, p.width());
  }

  S part(const Index& at, int64_t c, S* copy) const {
    const int64_t n = smaller(visible(at) - c * chunk, chunk);
    return n > 0 ? sum(at, c * chunk, n, copy) : S(0);
  }

  S combine(const S* parts, int64_t count) const {
    S row = 0;
    for (int64_t c = 0; c < count; ++c) row += parts[c];
    return row;
  }

  void finish(const Index& at, int64_t c, S row, S* copy) const {
    const int64_t j0 = c * chunk, end = smaller(p.width() - j0, chunk);
    const int64_t n = larger(smaller(visible(at) - j0, chunk), int64_t(0));
    if (n > 0) write(at, j0, n, row, copy);
    write_zeros(at, j0 + n, j0 + end);
  }
};

// --- rows over threads ---------------------------------------------------------------------------

// row(where) for all rows. Causal rows grow, so threads take turns.
template <class Params, class Row>
FUSEDATTN_INLINE void for_rows(const Params& p, const Row& row) {
  const int64_t count = p.rows();
  const int64_t block = p.options.causal == SoftmaxCausal::none
                            ? ceil_div(count, omp_get_num_threads())
                            : int64_t(16);
#pragma omp for schedule(static, 1)
  for (int64_t first = 0; first < count; first += block) {
    Index at = index_of(p, first);
    for (int64_t r = first; r < smaller(first + block, count); ++r) {
      row(at);
      at.next(p);
    }
  }
}

// Rows of one chunk.
template <class Rows, class Params>
void run_narrow(const Params& p, int threads) {
  typedef typename Rows::S S;
  const Rows rows{p};
  const bool plain = rows.plain();
  on_threads(threads, [&] {
    const bool done = plain && with_vectors<S>(p.width(), [&](auto vectors) {
                        const ShortRow<typename Rows::Element, vectors()> row(p.width());
                        for_rows(p, [&](const Index& at) { rows.short_row(at, row); });
                        drain();
                      });
    if (done) return;
    alignas(64) S copy[2 * chunk];
    if (plain)
      for_rows(p, [&](const Index& at) { rows.plain_row(at, copy); });
    else
      for_rows(p, [&](const Index& at) { rows.narrow(at, copy); });
    drain();
  });
}

// Rows of several chunks: a thread each, or, where rows are few, all threads on one after another.
template <class Rows, class Params>
void run_wide(const Params& p, int threads) {
  const Rows rows{p};
  const int64_t count = p.rows(), chunks = ceil_div(p.width(), chunk);
  const bool shared = count < 8 * threads && threads > 1;
  typedef decltype(rows.part(Index{}, 0, nullptr)) Piece;
  Arena own_part;
  own_part.take<Piece>(chunks);
  // While some threads still combine one row, others write the parts of the next.
  const Workspace workspace(0, own_part.used(), larger(threads, 2));
  on_threads(threads, [&] {
    alignas(64) typename Rows::S copy[2 * chunk];
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t first = shared ? 0 : count * me / team;
    const int64_t last = shared ? count : count * (me + 1) / team;
    const int64_t c0 = shared ? chunks * me / team : 0;
    const int64_t c1 = shared ? chunks * (me + 1) / team : chunks;
    Index at = index_of(p, first);
    for (int64_t r = first; r < last; ++r) {
      Piece* const own = workspace.own(shared ? r % 2 : me).template take<Piece>(chunks);
      for (int64_t c = c0; c < c1; ++c) own[c] = rows.part(at, c, copy);
      if (shared) {
#pragma omp barrier
      }
      const Piece row = rows.combine(own, chunks);
      for (int64_t c = c0; c < c1; ++c) rows.finish(at, c, row, copy);
      at.next(p);
    }
    drain();
  });
}

template <class Rows, class Params>
void run_rows(const Params& p) {
  const int threads = threads_for_elements(p.work());
  p.width() <= chunk ? run_narrow<Rows>(p, threads) : run_wide<Rows>(p, threads);
}

template <class T>
bool softmax_forward(const SoftmaxForward& p) {
  SoftmaxForward q = p;
  if (p.x.stride[3] != 1 && columns_of(q, width<compute_t<T>>))
    forward_columns<T>(q);
  else
    run_rows<ForwardRows<T>>(p);
  return true;
}

template <class T>
bool softmax_backward(const SoftmaxBackward& p) {
  SoftmaxBackward q = p;
  if (p.out.stride[3] != 1 && columns_of(q, width<compute_t<T>>))
    backward_columns<T>(q);
  else
    run_rows<BackwardRows<T>>(p);
  return true;
}

template <class T>
void add(SoftmaxKernels& kernels, DType dtype) {
  if constexpr (served<T>) {
    kernel_for<SoftmaxForward>(kernels, dtype) = {softmax_forward<T>};
    kernel_for<SoftmaxBackward>(kernels, dtype) = {softmax_backward<T>};
  }
}

}  // namespace

SoftmaxKernels softmax_kernels() {
  SoftmaxKernels kernels;
  add<f16>(kernels, DType::f16);
  add<bf16>(kernels, DType::bf16);
  add<float>(kernels, DType::f32);
  add<double>(kernels, DType::f64);
  return kernels;
}

}  // namespace fusedattn::FUSEDATTN_ISA
