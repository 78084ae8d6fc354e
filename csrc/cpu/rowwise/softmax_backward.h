// Softmax along rows that lie along memory, backward: a row, or a chunk of a wide one.
#pragma once

#include "softmax_short.h"

namespace fusedattn::FUSEDATTN_ISA {
namespace {

// d = scale · out ∘ (dout − row).
template <class T, class Out, class S, class Fetch>
FUSEDATTN_INLINE void gradient_of_row(const T* dout, const T* out, int64_t n, S row, S scale,
                                      bool streamed, const Fetch& fetch, Out* d) {
  const auto value = [=](int64_t j, auto left) {
    return load_some(out + j, left, S(0)) * (load_some(dout + j, left, S(0)) * scale - row * scale);
  };
  write_values(d, n, streamed, value, fetch);
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

  void plain_rows(S*) const {
    for_rows(p, [&](const Index& at) { plain_row(at); });
  }

  void plain_row(const Index& at) const {
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

}  // namespace
}  // namespace fusedattn::FUSEDATTN_ISA
