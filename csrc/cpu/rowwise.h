// What the row-wise ops share: whole vectors and tails in one loop body, and the division of work.
#pragma once

#include <type_traits>

#include "cache.h"
#include "dtypes.h"
#include "prefetch.h"
#include "team.h"

namespace fusedattn::FUSEDATTN_ISA {

constexpr double log2e = 1.4426950408889634;

// Of exp2: it errs by a twentieth of what rounding to bf16 loses, a hundredth of fp16's rounding.
template <class T>
constexpr int exp2_degree = std::is_same_v<T, bf16> ? 3
                            : sizeof(T) == 2        ? 4
                                                    : 6;

FUSEDATTN_INLINE int64_t ceil_div(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
FUSEDATTN_INLINE int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

template <class X>
FUSEDATTN_INLINE X smaller(X a, X b) {
  return a < b ? a : b;
}
template <class X>
FUSEDATTN_INLINE X larger(X a, X b) {
  return a > b ? a : b;
}

FUSEDATTN_INLINE int threads_for_elements(int64_t elements) {
  return threads_if(elements >= 24576);
}

// Whether a call's tensors, of so many elements each where present, outgrow so many quarters of the
// caches. Then what is read is fetched ahead and results go past them: in training they lie where
// nobody has lately been, and a line that is not fetched to be overwritten spares a fourth to a
// third of all traffic. That pays from a quarter on, with little else to do than reading and
// writing from two.
template <class... Tensors>
FUSEDATTN_INLINE bool outgrows_caches(int quarters, int threads, int64_t elements,
                                      const Tensors&... tensors) {
  const int64_t bytes = (0 + ... + (tensors ? elements * bytes_of(tensors.dtype) : 0));
  return bytes >= cache_bytes(threads) / 4 * quarters;
}

// Fetches the lines of so many elements.
template <class P, class Fetch>
FUSEDATTN_INLINE void fetch_lines(const P* p, int elements, const Fetch& fetch) {
  constexpr int line = 64;
#pragma GCC unroll 8
  for (int i = 0; i < elements * int(sizeof(P)); i += line)
    fetch(reinterpret_cast<const char*>(p) + i);
}

// Fetches what a row-wise loop comes to a page later; the processor's own prefetch ends with the
// page.
template <class P, class Fetch>
FUSEDATTN_INLINE void fetch_ahead(const P* p, int elements, const Fetch& fetch) {
  constexpr int ahead = 5120;
  fetch_lines(reinterpret_cast<const char*>(p) + ahead, elements * int(sizeof(P)), fetch);
}

// The same for what is read once.
template <class P>
FUSEDATTN_INLINE void fetch_ahead(const P* p, int elements) {
  fetch_ahead(p, elements, prefetch_once);
}

// How many rows later the row is that a pass fetches which finds its own in the nearest cache, so
// that memory does not stand idle meanwhile: two, more where those do not fill a page, one where
// they would push out the row at hand; 0 is none. `far`: the call's tensors are no less than a
// quarter of the caches; what is smaller is mostly near, and asking for it costs up to a tenth. In
// Intel's last cache softmax gains from it all the same.
FUSEDATTN_INLINE int64_t rows_on(bool far, int64_t rows, int64_t row_bytes) {
  constexpr int64_t page = 4096;
  const int64_t on = 2 * row_bytes < page ? page / row_bytes : row_bytes > 4 * page ? 1 : 2;
  return far && on < rows ? on : 0;
}

// Part `index` of `parts` of [0, count), in multiples of `grain`.
struct Range {
  int64_t begin, end;
};

FUSEDATTN_INLINE Range part_of(int64_t count, int index, int parts, int64_t grain = 1) {
  const int64_t grains = (count + grain - 1) / grain;
  const int64_t begin = grains * index / parts * grain;
  const int64_t end = grains * (index + 1) / parts * grain;
  return {begin < count ? begin : count, end < count ? end : count};
}

// How much of a vector a loop body handles: all of it, or the first n lanes.
struct Whole {};
struct Some {
  int n;
};

template <class T, class S = compute_t<T>>
FUSEDATTN_INLINE vec<S> load_some(const T* p, Whole, S) {
  return load_as(p);
}

template <class T, class S = compute_t<T>>
FUSEDATTN_INLINE void store_some(T* p, Whole, vec<S> x) {
  store_as(p, x);
}

// So many bytes, 2 to 8 and even, above them 0.
FUSEDATTN_INLINE uint64_t load_word(const char* p, int bytes) {
  if (bytes < 4) {
    uint16_t all;
    memcpy(&all, p, 2);
    return all;
  }
  uint32_t low, high;
  memcpy(&low, p, 4);
  memcpy(&high, p + bytes - 4, 4);
  return low | uint64_t(high) << 8 * (bytes - 4);
}

typedef uint64_t whole_words __attribute__((vector_size(vector_bytes)));
typedef uint64_t half_words __attribute__((vector_size(vector_bytes / 2)));

template <class Words>
FUSEDATTN_INLINE Words load_words(const char* p, int bytes) {
  Words words = {};
#pragma GCC unroll 8
  for (int i = 0; i < int(sizeof(Words) / 8); ++i) {
    const int left = bytes - 8 * i;
    if (left > 0) words[i] = load_word(p + 8 * i, left < 8 ? left : 8);
  }
  return words;
}

// A vector of which only the first lanes exist, 0 < left < width: the others are `rest`, and
// nothing there is touched. Made up of words: read over single stores it would wait for all of
// them.
template <class T, class S = compute_t<T>>
FUSEDATTN_INLINE vec<S> load_some(const T* p, int64_t left, S rest) {
  const char* const from = reinterpret_cast<const char*>(p);
  T lanes[width<S>];
  if constexpr (sizeof(lanes) == vector_bytes) {
    const whole_words words = load_words<whole_words>(from, int(left * sizeof(T)));
    memcpy(static_cast<void*>(lanes), &words, sizeof(lanes));
  } else {
    const half_words words = load_words<half_words>(from, int(left * sizeof(T)));
    memcpy(static_cast<void*>(lanes), &words, sizeof(lanes));
  }
  return select_below(int(left), load_as(lanes), splat(rest));
}

template <class T, class S = compute_t<T>>
FUSEDATTN_INLINE void store_some(T* p, int64_t left, vec<S> x) {
  alignas(64) T lanes[width<S>];
  store_as(lanes, x);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
    return _mm256_mask_storeu_epi16(p, __mmask16((1u << left) - 1), bits);
  }
#endif
  const T* from = lanes;
  const auto move = [&](auto count) __attribute__((always_inline)) {
    if (!(left & count)) return;
    memcpy(static_cast<void*>(p), from, count * sizeof(T));
    p += count, from += count;
  };
  if constexpr (width<S> > 4) move(std::integral_constant<int, 4>{});
  if constexpr (width<S> > 2) move(std::integral_constant<int, 2>{});
  move(std::integral_constant<int, 1>{});
}

#if defined(__AVX512F__)
// The same by masked moves.
FUSEDATTN_INLINE vec<float> load_some(const float* p, int64_t left, float rest) {
  return _mm512_mask_loadu_ps(splat(rest), __mmask16((1u << left) - 1), p);
}

FUSEDATTN_INLINE vec<float> load_some(const bf16* p, int64_t left, float rest) {
  const __mmask16 lanes = __mmask16((1u << left) - 1);
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
  return _mm512_mask_blend_ps(lanes, splat(rest), (vec<float>)_mm512_slli_epi32(bits, 16));
}

FUSEDATTN_INLINE vec<float> load_some(const f16* p, int64_t left, float rest) {
  const __mmask16 lanes = __mmask16((1u << left) - 1);
  return _mm512_mask_cvtph_ps(splat(rest), lanes, _mm256_maskz_loadu_epi16(lanes, p));
}

FUSEDATTN_INLINE void store_some(float* p, int64_t left, vec<float> x) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << left) - 1), x);
}
#endif

// `width<S>` elements as S, 0 past the end of a tail.
template <class S, class P>
FUSEDATTN_INLINE vec<S> get(const P* p, Whole) {
  if constexpr (sizeof(compute_t<P>) == sizeof(S)) {
    return load_as(p);
  } else {
    vec<S> x;
    for (int i = 0; i < width<S>; ++i) x[i] = S(to_float(p[i]));
    return x;
  }
}

template <class S, class P>
FUSEDATTN_INLINE vec<S> get(const P* p, Some tail) {
  if constexpr (sizeof(compute_t<P>) == sizeof(S)) {
    return load_some(p, tail.n, S(0));
  } else {
    alignas(64) S x[width<S>] = {};
    for (int i = 0; i < tail.n; ++i) x[i] = S(to_float(p[i]));
    return load(x);
  }
}

// Two vectors' elements in the order of `load_pair`.
template <class S, class P>
FUSEDATTN_INLINE void get_pair(const P* p, vec<S>& x, vec<S>& y) {
  if constexpr (sizeof(compute_t<P>) == sizeof(S)) {
    load_pair<S>(p, x, y);
  } else {
    x = get<S>(p, Whole{});
    y = get<S>(p + width<S>, Whole{});
  }
}

// x rounded to P.
template <class S, class P>
FUSEDATTN_INLINE void set(P* p, vec<S> x, Whole) {
  if constexpr (sizeof(compute_t<P>) == sizeof(S)) {
    store_as(p, x);
  } else {
    for (int i = 0; i < width<S>; ++i) put(p + i, compute_t<P>(x[i]));
  }
}

template <class S, class P>
FUSEDATTN_INLINE void set(P* p, vec<S> x, Some tail) {
  if constexpr (sizeof(compute_t<P>) == sizeof(S)) {
    store_some(p, tail.n, x);
  } else {
    alignas(64) S lanes[width<S>];
    store(lanes, x);
    for (int i = 0; i < tail.n; ++i) put(p + i, compute_t<P>(lanes[i]));
  }
}

// Two vectors in their order, rounded to P.
template <class S, class P>
FUSEDATTN_INLINE void set_pair(P* p, vec<S> x, vec<S> y) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<P, bf16> && std::is_same_v<S, float>)
    return _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(y, x));
#endif
  set<S>(p, x, Whole{});
  set<S>(p + width<S>, y, Whole{});
}

template <class V>
FUSEDATTN_INLINE V zero_past(V x, Whole) {
  return x;
}
template <class V>
FUSEDATTN_INLINE V zero_past(V x, Some tail) {
  return select_below(tail.n, x, V{});
}

// body(i, lanes) for the vectors of n elements.
template <class S, class Body>
FUSEDATTN_INLINE void for_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + width<S> <= n; i += width<S>) body(i, Whole{});
  if (i < n) body(i, Some{int(n - i)});
}

// block(i) for the whole blocks of n elements, and flush() after every few: what a block adds to
// goes on to another sum there. In a long chain of additions equal numbers are all rounded to the
// same side. Returns how many elements these were.
template <int Size, class Block, class Flush>
FUSEDATTN_INLINE int64_t in_short_sums(int64_t n, const Block& block, const Flush& flush) {
  constexpr int64_t few = (width<float> < 8 ? 16 : 32) * Size;
  int64_t i = 0;
  while (i + Size <= n) {
    block(i);
    i += Size;
    if (i % few == 0) [[unlikely]]
      flush();
  }
  return i;
}

// The same past the caches; p is aligned to a vector.
template <class S, class P>
FUSEDATTN_INLINE void stream_pair(P* p, vec<S> x, vec<S> y) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<P, bf16> && std::is_same_v<S, float>)
    return stream(p, _mm512_cvtne2ps_pbh(y, x));
#endif
  typedef char rounded __attribute__((vector_size(width<S> * sizeof(P))));
  rounded parts[2];
  set<S>(reinterpret_cast<P*>(&parts[0]), x, Whole{});
  set<S>(reinterpret_cast<P*>(&parts[1]), y, Whole{});
  stream(p, parts[0]);
  stream(p + width<S>, parts[1]);
}

// Whether results from here on can go past the caches; with short vectors memory is not what one
// waits for.
FUSEDATTN_INLINE bool can_stream(const void* to) {
  return vector_bytes >= 32 && reinterpret_cast<uintptr_t>(to) % vector_bytes == 0;
}

// A row of so many vectors, the last of them with 0 < left <= width elements.
template <class T, int Vectors>
class FewVectors {
  typedef compute_t<T> S;
  static constexpr int w = width<S>, last = Vectors - 1;
  const int64_t left;

 public:
  explicit FewVectors(int64_t n) : left(n - last * w) {}
  static bool fit(int64_t n) { return last * w < n && n <= Vectors * w; }

  FUSEDATTN_MEMBER void load(const T* p, S rest, vec<S> (&x)[Vectors]) const {
#pragma GCC unroll 8
    for (int v = 0; v < last; ++v) x[v] = load_as(p + v * w);
    x[last] = left == w ? load_as(p + last * w) : load_some(p + last * w, left, rest);
  }
  FUSEDATTN_MEMBER void store(T* p, const vec<S> (&x)[Vectors]) const {
#pragma GCC unroll 8
    for (int v = 0; v < last; ++v) store_as(p + v * w, x[v]);
    left == w ? store_as(p + last * w, x[last]) : store_some(p + last * w, left, x[last]);
  }
  // Past the caches if wanted and possible.
  FUSEDATTN_MEMBER void store(T* p, const vec<S> (&x)[Vectors], bool past) const {
    if (Vectors % 2 != 0 || !past || left != w || !can_stream(p)) return store(p, x);
#pragma GCC unroll 4
    for (int v = 0; v < last; v += 2) stream_pair<S>(p + v * w, x[v], x[v + 1]);
  }
  // Pairs first.
  FUSEDATTN_MEMBER static S sum(const vec<S> (&x)[Vectors]) {
    return reduce_add(sum_of<0, Vectors>(x));
  }

 private:
  template <int From, int Count>
  FUSEDATTN_MEMBER static vec<S> sum_of(const vec<S> (&x)[Vectors]) {
    if constexpr (Count == 1) {
      return x[From];
    } else {
      constexpr int half = Count == 3 ? 2 : Count / 2;
      return sum_of<From, half>(x) + sum_of<From + half, Count - half>(x);
    }
  }
};

struct FetchNothing {
  FUSEDATTN_MEMBER void operator()(int64_t, int) const {}
};

// value(i, lanes) past the caches, at to + i, for as many of n elements as can be; returns how
// many. fetch(i, count) goes before each `count` of them.
template <class S, class P, class Value, class Fetch = FetchNothing>
FUSEDATTN_INLINE int64_t stream_vectors(P* to, int64_t n, const Value& value,
                                        const Fetch& fetch = {}) {
  constexpr int w = width<S>;
  int64_t i = 0;
  if (can_stream(to)) {
    for (; i + 2 * w <= n; i += 2 * w) {
      fetch(i, 2 * w);
      stream_pair<S>(to + i, value(i, Whole{}), value(i + w, Whole{}));
    }
  }
  return i;
}

// n elements past the caches, where `to` is aligned.
template <class P>
FUSEDATTN_INLINE void stream_copy(P* to, const P* from, int64_t n) {
  constexpr int w = vector_bytes / sizeof(P);
  int64_t i = 0;
  if (reinterpret_cast<uintptr_t>(to) % vector_bytes == 0)
    for (; i + w <= n; i += w) stream(to + i, *reinterpret_cast<const loose_bits*>(from + i));
  memcpy(static_cast<void*>(to + i), from + i, (n - i) * sizeof(P));
}

// value(i, lanes) for the vectors of n elements, rounded to P at to + i; fetch as there.
template <class S, class P, class Value, class Fetch = FetchNothing>
FUSEDATTN_INLINE void write_vectors(P* to, int64_t n, bool streamed, const Value& value,
                                    const Fetch& fetch = {}) {
  constexpr int w = width<S>;
  int64_t i = streamed ? stream_vectors<S>(to, n, value, fetch) : 0;
  for (; i + 2 * w <= n; i += 2 * w) {
    fetch(i, 2 * w);
    set_pair<S>(to + i, value(i, Whole{}), value(i + w, Whole{}));
  }
  for_vectors<S>(n - i,
                 [&](int64_t j, auto lanes) { set<S>(to + i + j, value(i + j, lanes), lanes); });
}

// f(pointer to the element at (row, column)) with the type that the tensor has.
template <class F>
FUSEDATTN_INLINE void typed(const TensorView& x, int64_t row, int64_t column, const F& f) {
  const int64_t at = row * x.stride[0] + column;
  switch (x.dtype) {
    case DType::f16:
      return f(static_cast<f16*>(x.data) + at);
    case DType::bf16:
      return f(static_cast<bf16*>(x.data) + at);
    case DType::f32:
      return f(static_cast<float*>(x.data) + at);
    default:
      return f(static_cast<double*>(x.data) + at);
  }
}

// n elements of a row as S.
template <class S>
static void read_row(const TensorView& x, int64_t row, int64_t column, int64_t n, S* to) {
  typed(x, row, column, [&](const auto* from) {
    for_vectors<S>(n,
                   [&](int64_t i, auto lanes) { set<S>(to + i, get<S>(from + i, lanes), lanes); });
  });
}

// n elements of S, rounded to the dtype of the row.
template <class S>
static void write_row(const TensorView& x, int64_t row, int64_t column, int64_t n, const S* from) {
  typed(x, row, column, [&](auto* to) {
    for_vectors<S>(n,
                   [&](int64_t i, auto lanes) { set<S>(to + i, get<S>(from + i, lanes), lanes); });
  });
}

}  // namespace fusedattn::FUSEDATTN_ISA
