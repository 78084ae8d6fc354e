// SwiGLU and its kin: out = act(gate) ∘ up, and both gradients in one pass over dout, gate and up.
//
// An activation but relu is x·s(x) with a smooth step s from 0 to 1, and its slope is s + x·s′. As
// in eager an infinity times 0 is NaN. Rows are cut into pieces; threads get a run of them each.
#include "swiglu.h"

#include "rowwise.h"

namespace fusedattn::FUSEDATTN_ISA {
namespace {

constexpr int64_t piece = 8192;  // columns

template <class S>
FUSEDATTN_INLINE vec<S> magnitude(vec<S> x) {
  return (vec<S>)((ints<S>)x & ~(ints<S>)splat(-S(0)));
}

template <class S>
struct Step {
  vec<S> at, slope;
};

// 1 / (1 + exp(−x)) by the exponential of −|x|, which is never large.
template <class T, class S>
FUSEDATTN_INLINE Step<S> sigmoid(vec<S> x) {
  const vec<S> e = exp2<exp2_degree<T>>(magnitude<S>(x) * S(-log2e)), below = 1 / (1 + e);
  return {x < 0 ? e * below : below, e * below * below};
}

// Φ(x), with e = exp(−x²/2).
template <class T>
FUSEDATTN_INLINE vec<float> normal(vec<float> x, vec<float> e) {
  const vec<float> y = magnitude<float>(x), tail = normal_tail(1.0f / (0.35f * y + 1.0f), e);
  const vec<float> far = x > 0 ? 1 - tail : tail;
  if constexpr (sizeof(T) == 2) return far;
  return y < 1.25f ? normal_near_0(x) : far;
}

template <class T>
FUSEDATTN_INLINE vec<double> normal(vec<double> x, vec<double>) {
  vec<double> all;
  for (int i = 0; i < width<double>; ++i)
    all[i] = 0.5 * __builtin_erfc(x[i] * -0x1.6a09e667f3bcdp-1);
  return all;
}

template <class T, Activation A, class S>
FUSEDATTN_INLINE Step<S> step(vec<S> x) {
  if constexpr (A == Activation::silu) {
    return sigmoid<T, S>(x);
  } else if constexpr (A == Activation::gelu) {
    const vec<S> e = exp2<exp2_degree<T>>(x * x * S(-0.5 * log2e));
    return {normal<T>(x, e), e * S(0.39894228040143268)};
  } else {
    constexpr S cubic = S(0.044715), twice = S(1.59576912160573071);  // 2√(2/π)
    const vec<S> square = x * x, most = splat(S(1e4));  // beyond it the sigmoid is level
    const Step<S> s = sigmoid<T, S>(x * twice * (square * cubic + 1));
    return {s.at, s.slope * twice * ((square < most ? square : most) * (3 * cubic) + 1)};
  }
}

// act(x).
template <class T, Activation A, class S>
FUSEDATTN_INLINE vec<S> activated(vec<S> x) {
  if constexpr (A == Activation::relu)
    return x <= 0 ? vec<S>{} : x;
  else
    return x * step<T, A, S>(x).at;
}

// up becomes dgate, and dout dup.
template <class T, Activation A, class S>
FUSEDATTN_INLINE void pull_back(vec<S> x, vec<S>& up, vec<S>& dout) {
  const vec<S> both = dout * up;
  if constexpr (A == Activation::relu) {
    up = x <= 0 ? vec<S>{} : both;
    dout *= x <= 0 ? vec<S>{} : x;
  } else {
    const Step<S> s = step<T, A, S>(x);
    up = both * (s.at + x * s.slope);
    dout *= x * s.at;
  }
}

// Two vectors of elements that are taken and given back, rounded to P, in one order: bf16 in halves
// of a float, where a set widens and narrows no faster.
#if defined(__AVX512F__)
template <class S, class P>
constexpr bool in_halves = false;
#else
template <class S, class P>
constexpr bool in_halves = std::is_same_v<P, bf16> && std::is_same_v<S, float>;
#endif

template <class S, class P>
FUSEDATTN_INLINE void take_pair(const P* p, vec<S>& x, vec<S>& y) {
  if constexpr (in_halves<S, P>) return get_pair<S>(p, x, y);
  x = get<S>(p, Whole{});
  y = get<S>(p + width<S>, Whole{});
}

// Past the caches if wanted; p is then aligned to a vector. Rounding needs no eye on a NaN: what
// comes of a bf16 one ends in zeros, and nothing carries over.
template <class S, class P>
FUSEDATTN_INLINE void give_pair(P* p, vec<S> x, vec<S> y, bool streamed) {
  if constexpr (in_halves<S, P>) {
    typedef uint32_t words __attribute__((vector_size(vector_bytes)));
    const auto rounded = [](vec<S> z) {
      const words bits = (words)z;
      return bits + 0x7fff + (bits >> 16 & 1);
    };
    const words both = (rounded(y) & 0xffff0000) | rounded(x) >> 16;
    if (streamed) return stream(p, both);
    *reinterpret_cast<loose_bits*>(p) = (loose_bits)both;
  } else {
    streamed ? stream_pair<S>(p, x, y) : set_pair<S>(p, x, y);
  }
}

// task(b, h, i, j, n): columns j to j + n of row (b, h, i).
template <class Task>
void for_pieces(const int64_t* shape, int threads, const Task& task) {
  const int64_t width = shape[3], pieces = ceil_div(width, piece);
  const int64_t rows = shape[0] * shape[1] * shape[2];
  on_threads(threads, [&] {
    const Range own = part_of(rows * pieces, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t t = own.begin; t < own.end; ++t) {
      const int64_t row = t / pieces, j = t % pieces * piece, matrix = row / shape[2];
      task(matrix / shape[1], matrix % shape[1], row % shape[2], j, smaller(width - j, piece));
    }
    drain();
  });
}

template <class T, Activation A>
void forward(const SwigluForward& p, int threads) {
  typedef compute_t<T> S;
  constexpr int w = width<S>;
  const bool large = outgrows_caches(1, threads, p.work(), p.gate, p.up, p.out);
  for_pieces(p.out.shape, threads, [&](int64_t b, int64_t h, int64_t i, int64_t j, int64_t n) {
    const T* const gate = p.gate.at<const T>(b, h, i, j);
    const T* const up = p.up.at<const T>(b, h, i, j);
    T* const out = p.out.at<T>(b, h, i, j);
    const bool streamed = large && can_stream(out);
    int64_t k = 0;
    for (; k + 2 * w <= n; k += 2 * w) {
      vec<S> x[2], u[2];
      take_pair<S>(gate + k, x[0], x[1]);
      take_pair<S>(up + k, u[0], u[1]);
      give_pair<S>(out + k, activated<T, A, S>(x[0]) * u[0], activated<T, A, S>(x[1]) * u[1],
                   streamed);
    }
    for_vectors<S>(n - k, [&](int64_t l, auto lanes) {
      const vec<S> x = get<S>(gate + k + l, lanes), u = get<S>(up + k + l, lanes);
      set<S>(out + k + l, activated<T, A, S>(x) * u, lanes);
    });
  });
}

template <class T, Activation A>
void backward(const SwigluBackward& p, int threads) {
  typedef compute_t<T> S;
  constexpr int w = width<S>;
  const bool large = outgrows_caches(1, threads, p.work(), p.dout, p.gate, p.up, p.dgate, p.dup);
  for_pieces(p.dout.shape, threads, [&](int64_t b, int64_t h, int64_t i, int64_t j, int64_t n) {
    const T* const dout = p.dout.at<const T>(b, h, i, j);
    const T* const gate = p.gate.at<const T>(b, h, i, j);
    const T* const up = p.up.at<const T>(b, h, i, j);
    T *const dgate = p.dgate.at<T>(b, h, i, j), *const dup = p.dup.at<T>(b, h, i, j);
    const bool streamed = large && can_stream(dgate) && can_stream(dup);
    int64_t k = 0;
    for (; k + 2 * w <= n; k += 2 * w) {
      vec<S> x[2], u[2], d[2];
      take_pair<S>(gate + k, x[0], x[1]);
      take_pair<S>(up + k, u[0], u[1]);
      take_pair<S>(dout + k, d[0], d[1]);
      for (int v = 0; v < 2; ++v) pull_back<T, A, S>(x[v], u[v], d[v]);
      give_pair<S>(dgate + k, u[0], u[1], streamed);
      give_pair<S>(dup + k, d[0], d[1], streamed);
    }
    for_vectors<S>(n - k, [&](int64_t l, auto lanes) {
      vec<S> u = get<S>(up + k + l, lanes), d = get<S>(dout + k + l, lanes);
      pull_back<T, A, S>(get<S>(gate + k + l, lanes), u, d);
      set<S>(dgate + k + l, u, lanes);
      set<S>(dup + k + l, d, lanes);
    });
  });
}

// run(the activation, as a constant).
template <class Run>
void with_activation(Activation activation, const Run& run) {
  switch (activation) {
    case Activation::silu:
      return run(std::integral_constant<Activation, Activation::silu>{});
    case Activation::gelu:
      return run(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return run(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::relu:
      return run(std::integral_constant<Activation, Activation::relu>{});
  }
}

template <class T>
bool swiglu_forward(const SwigluForward& p) {
  const SwigluForward rows = as_rows(p);
  with_activation(p.options.activation, [&](auto activation) {
    forward<T, activation()>(rows, threads_for_elements(p.work()));
  });
  return true;
}

template <class T>
bool swiglu_backward(const SwigluBackward& p) {
  const SwigluBackward rows = as_rows(p);
  with_activation(p.options.activation, [&](auto activation) {
    backward<T, activation()>(rows, threads_for_elements(p.work()));
  });
  return true;
}

}  // namespace

SwigluKernels swiglu_kernels() {
  return by_dtype<SwigluKernels>([]<class T>(SwigluKernels& kernels, DType dtype) {
    kernel_for<SwigluForward>(kernels, dtype) = {swiglu_forward<T>};
    kernel_for<SwigluBackward>(kernels, dtype) = {swiglu_backward<T>};
  });
}

}  // namespace fusedattn::FUSEDATTN_ISA
