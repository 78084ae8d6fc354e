// Softmax over rows of up to `unroll` vectors, which stay in registers from the read to the write.
// To the same bits as longer ones, of which the vectors that are missing add 0.
#pragma once

#include "softmax_vectors.h"

namespace fusedattn::FUSEDATTN_ISA {
namespace {

template <class T, int Vectors>
class ShortRow : FewVectors<T, Vectors> {
  typedef compute_t<T> S;
  typedef FewVectors<T, Vectors> Row;
  static constexpr bool fetches = sizeof(T) > 2;  // in 16 bits arithmetic is what one waits for
  const int64_t n;

 public:
  explicit ShortRow(int64_t n) : Row(n), n(n) {}

  // Fetches the row that lies so much on, and writes past the caches if `past`; so does `backward`.
  template <int Degree>
  FUSEDATTN_MEMBER void forward(const T* from, int64_t on, S factor, bool past, T* out) const {
    if (fetches && on) fetch_lines(from + on, int(n), prefetch);
    vec<S> x[Vectors], high = splat(-infinity<S>);
    Row::load(from, -infinity<S>, x);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) high = maximum(x[v], high);
    with_exponent<T>(finite_origin(reduce_max(high)), factor, [&](const auto& exponent) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) x[v] = exp2<Degree>(exponent(x[v]));
    });
    const S inverse = reciprocal(Row::sum(x));
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) x[v] *= inverse;
    Row::store(out, x, past);
  }

  FUSEDATTN_MEMBER void backward(const T* dout, const T* out, On on, S scale, bool past,
                                 T* dx) const {
    if (fetches && on.out) {
      fetch_lines(dout + on.dout, int(n), prefetch);
      fetch_lines(out + on.out, int(n), prefetch);
    }
    vec<S> g[Vectors], y[Vectors], product[Vectors];
    Row::load(dout, 0, g);
    Row::load(out, 0, y);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) product[v] = rounded(g[v] * y[v]);
    const S row = dot_of(dout, out, product) * scale;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) y[v] *= g[v] * scale - row;
    Row::store(dx, y, past);
  }

 private:
  FUSEDATTN_MEMBER S dot_of([[maybe_unused]] const T* x, [[maybe_unused]] const T* y,
                            const vec<S> (&product)[Vectors]) const {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bf16>) return dot(x, y, n, false);
#endif
    return Row::sum(product);
  }
};

// f(the row's vectors as a constant) for rows of n elements; false if they are too many.
template <class S, class F>
FUSEDATTN_INLINE bool with_vectors(int64_t n, const F& f) {
  switch (ceil_div(n, width<S>)) {
    case 1:
      return f(std::integral_constant<int, 1>{}), true;
    case 2:
      return f(std::integral_constant<int, 2>{}), true;
    case 3:
      return f(std::integral_constant<int, 3>{}), true;
    case 4:
      return f(std::integral_constant<int, 4>{}), true;
    default:
      return false;
  }
}

}  // namespace
}  // namespace fusedattn::FUSEDATTN_ISA
