// One SIMD vocabulary for every instruction set, on the compiler's vector extensions.
//
// Each isa_<name>.cpp compiles these headers with its own flags into its own namespace
// (FUSEDATTN_ISA), so that no instruction leaks into code that an older CPU runs. For the same
// reason nothing here calls a library template that the linker could share between them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "tensor_view.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef FUSEDATTN_ISA
#error "include this from an isa_<name>.cpp, which names its instruction set"
#endif

#define FUSEDATTN_INLINE static inline __attribute__((always_inline))

namespace fusedattn::FUSEDATTN_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int vector_registers = 32;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
constexpr int vector_registers = 16;
#else
constexpr int vector_bytes = 16;
#if defined(__aarch64__)
constexpr int vector_registers = 32;
#else
constexpr int vector_registers = 16;
#endif
#endif

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// A vector's bits as they lie in memory, at any address and of any type. In a typedef within a
// template GCC 12 forgets `may_alias`.
typedef char loose_bits __attribute__((vector_size(vector_bytes), aligned(1), may_alias));

template <class V>
FUSEDATTN_INLINE V load_bits(const void* p) {
  const loose_bits bits = *static_cast<const loose_bits*>(p);
  return (V)bits;
}

// Vectors of S (float or double): the arithmetic operators are the compiler's.
template <class S>
struct simd;

template <>
struct simd<float> {
  static constexpr int width = vector_bytes / 4;
  typedef float vec __attribute__((vector_size(vector_bytes)));
  typedef int32_t ints __attribute__((vector_size(vector_bytes)));
  typedef float loose __attribute__((vector_size(vector_bytes), aligned(4), may_alias));
  typedef int8_t bytes __attribute__((vector_size(vector_bytes / 4), aligned(1), may_alias));
  typedef uint16_t halves __attribute__((vector_size(vector_bytes / 2), aligned(2), may_alias));
};

template <>
struct simd<double> {
  static constexpr int width = vector_bytes / 8;
  typedef double vec __attribute__((vector_size(vector_bytes)));
  typedef int64_t ints __attribute__((vector_size(vector_bytes)));
  typedef double loose __attribute__((vector_size(vector_bytes), aligned(8), may_alias));
  typedef int8_t bytes __attribute__((vector_size(vector_bytes / 8), aligned(1), may_alias));
};

template <class S>
using vec = typename simd<S>::vec;
template <class S>
using ints = typename simd<S>::ints;
template <class S>
constexpr int width = simd<S>::width;
template <class V>
constexpr int lanes = int(sizeof(V) / sizeof(V{}[0]));

template <class S>
constexpr S infinity = __builtin_inff();
template <>
constexpr double infinity<double> = __builtin_inf();

template <class S>
FUSEDATTN_INLINE vec<S> load(const S* p) {
  return *reinterpret_cast<const typename simd<S>::loose*>(p);
}

template <class S>
FUSEDATTN_INLINE void store(S* p, vec<S> x) {
  *reinterpret_cast<typename simd<S>::loose*>(p) = x;
}

template <class S>
FUSEDATTN_INLINE vec<S> splat(S x) {
  return x - vec<S>{};  // unlike x + 0 this is x for every x, and so a plain broadcast
}

// 0, 1, 2, …
template <class S>
FUSEDATTN_INLINE vec<S> counted() {
  vec<S> x{};
  for (int i = 0; i < width<S>; ++i) x[i] = S(i);
  return x;
}

// max(a, b) that returns b where either is NaN.
FUSEDATTN_INLINE vec<float> maximum(vec<float> a, vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

FUSEDATTN_INLINE vec<double> maximum(vec<double> a, vec<double> b) { return a > b ? a : b; }

#if defined(__AVX512F__)
FUSEDATTN_INLINE float reduce_max(vec<float> x) { return _mm512_reduce_max_ps(x); }
FUSEDATTN_INLINE float reduce_add(vec<float> x) { return _mm512_reduce_add_ps(x); }
#endif

template <class V>
FUSEDATTN_INLINE auto reduce_max(V x) {
  auto result = x[0];
  for (int i = 1; i < lanes<V>; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

template <class V>
FUSEDATTN_INLINE auto reduce_add(V x) {
  auto result = x[0];
  for (int i = 1; i < lanes<V>; ++i) result += x[i];
  return result;
}

template <class V>
FUSEDATTN_INLINE bool any(V mask) {
  auto result = mask[0];
  for (int i = 1; i < lanes<V>; ++i) result |= mask[i];
  return result != 0;
}

// The lanes below n keep x, the others take y.
template <class V>
FUSEDATTN_INLINE V select_below(int n, V x, V y) {
  decltype(x < y) lane;
  for (int i = 0; i < lanes<V>; ++i) lane[i] = i;
  return lane < n ? x : y;
}

// The lanes whose byte is not zero keep x, the others take y.
template <class S>
FUSEDATTN_INLINE vec<S> select_bytes(const uint8_t* p, vec<S> x, vec<S> y) {
#if defined(__AVX2__)  // GCC 12 would widen the bytes one by one
  const __m128i* const raw = reinterpret_cast<const __m128i*>(p);
#endif
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (std::is_same_v<S, float>) {
    const __m128i bytes = _mm_loadu_si128(raw);
    return _mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), y, x);
  } else {
    const __m128i bytes = _mm_loadl_epi64(raw);
    return _mm512_mask_blend_pd(__mmask8(_mm_test_epi8_mask(bytes, bytes)), y, x);
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<S, float>)
    return (ints<S>)_mm256_cvtepi8_epi32(_mm_loadl_epi64(raw)) != 0 ? x : y;
  else
    return (ints<S>)_mm256_cvtepi8_epi64(_mm_loadu_si32(raw)) != 0 ? x : y;
#else
  const auto bytes = *reinterpret_cast<const typename simd<S>::bytes*>(p);
  return __builtin_convertvector(bytes, ints<S>) != 0 ? x : y;
#endif
}

// x as it was rounded or loaded: no multiply-add reaches across, and it is not loaded again.
template <class V>
FUSEDATTN_INLINE V rounded(V x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// 2^x for x <= 0, by x = n + f and a minimax polynomial for 2^f that is 1 at 0: 0 <= f < 1 where
// one instruction gives f and another takes n from x, else |f| <= 1/2. Below the normal range the
// result is exactly 0; NaN stays NaN. `Degree` 3 errs by 1e-4, 4 by 3e-6, 6 by 2e-9, 13 by 5e-22
// (relative).
#if defined(__AVX512DQ__)
constexpr float exp2_of_degree_3[] = {7.70670420720698556e-2f, 2.27644991135395490e-1f,
                                      6.95116786445395685e-1f};
constexpr float exp2_of_degree_4[] = {1.34266842506499210e-2f, 5.22424742691215725e-2f,
                                      2.41280204722723637e-1f, 6.93044844908149691e-1f};
constexpr float exp2_of_degree_6[] = {2.16129149695573438e-4f, 1.24678464507734926e-3f,
                                      9.67545156521704052e-3f, 5.54852806201827848e-2f,
                                      2.40229305551738541e-1f, 6.93147044443366555e-1f};
#else
constexpr float exp2_of_degree_3[] = {5.50090578065836256e-2f, 2.42210974665369060e-1f,
                                      6.93282897992582300e-1f};
constexpr float exp2_of_degree_4[] = {9.66636851538544831e-3f, 5.59219758422558492e-2f,
                                      2.40223490380203614e-1f, 6.93121045203427105e-1f};
constexpr float exp2_of_degree_6[] = {1.54614446985691291e-4f, 1.34004281776158379e-3f,
                                      9.61805667852463808e-3f, 5.55032722667030206e-2f,
                                      2.40226509222887581e-1f, 6.93147206702832596e-1f};
#endif

template <int Degree>
FUSEDATTN_INLINE vec<float> exp2_polynomial(vec<float> f) {
  const float* const c = Degree == 3   ? exp2_of_degree_3
                         : Degree == 4 ? exp2_of_degree_4
                                       : exp2_of_degree_6;
  vec<float> p = splat(c[0]);
#pragma GCC unroll 6
  for (int i = 1; i < Degree; ++i) p = p * f + c[i];
  return p * f + 1.0f;
}

template <int Degree>
FUSEDATTN_INLINE vec<float> exp2(vec<float> x) {
#if defined(__AVX512DQ__)
  const vec<float> f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ);  // or NaN
  return _mm512_maskz_scalef_ps(normal, exp2_polynomial<Degree>(f), x);
#else
  // Adding 1.5·2²³ rounds to an integer in the low bits; + 127 makes those bits the exponent of
  // 2^n.
  constexpr float magic = 12582912.0f + 127.0f;
  x = maximum(splat(-127.0f), x);
  const vec<float> shifted = x + magic;
  const vec<float> f = x - (shifted - magic);
  const vec<float> power = (vec<float>)((ints<float>)shifted << 23);
  return exp2_polynomial<Degree>(f) * power;
#endif
}

template <int>
FUSEDATTN_INLINE vec<double> exp2(vec<double> x) {
  constexpr double magic = 6755399441055744.0 + 1023.0;
  constexpr double c[] = {1.37189234102621641e-12, 2.57378129710722089e-11,
                          4.44552883835549175e-10, 7.05489120288479736e-9,
                          1.01780860253219111e-7,  1.32154868249533541e-6,
                          1.52527338040457672e-5,  1.54035303933511492e-4,
                          1.33335581464284493e-3,  9.61812910762848985e-3,
                          5.55041086648215799e-2,  2.40226506959100712e-1,
                          6.93147180559945309e-1,  1.0};
  x = maximum(splat(-1023.0), x);
  const vec<double> shifted = x + magic;
  const vec<double> f = x - (shifted - magic);
  vec<double> p = splat(c[0]);
  for (int i = 1; i < 14; ++i) p = p * f + c[i];
  return p * (vec<double>)((ints<double>)shifted << 52);
}

// --- reading and writing the tensors' dtypes -----------------------------------------------------

FUSEDATTN_INLINE float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

FUSEDATTN_INLINE float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Move the exponent and mantissa into place and scale by 2^(127 − 15); this also normalises
  // subnormals. Infinity and NaN keep an all-ones exponent.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  float y;
  memcpy(&y, &magnitude, 4);
  y *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &y, 4);
  if (magnitude >= 0x0f800000) bits |= 0x7f800000;
  bits |= sign;
  memcpy(&y, &bits, 4);
  return y;
#endif
}

FUSEDATTN_INLINE float to_float(float x) { return x; }
FUSEDATTN_INLINE double to_float(double x) { return x; }

// x rounded to nearest even.
FUSEDATTN_INLINE void put(float* p, float x) { *p = x; }
FUSEDATTN_INLINE void put(double* p, double x) { *p = x; }

FUSEDATTN_INLINE void put(bf16* p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  p->bits = uint16_t(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

FUSEDATTN_INLINE void put(f16* p, float x) {
#if defined(__F16C__)
  p->bits = uint16_t(_cvtss_sh(x, 0));
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    bits = 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds to 65536 or more
    bits = 0x7c00;
  } else if (bits < 0x38800000) {
    // Subnormal: adding 1/2 leaves the rounded mantissa in the low bits.
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    bits -= 0x3f000000;
  } else {
    bits = (bits + 0xc8000fff + ((bits >> 13) & 1)) >> 13;
  }
  p->bits = uint16_t(sign | bits);
#endif
}

// `width` consecutive elements as S.
FUSEDATTN_INLINE vec<float> load_as(const float* p) { return load(p); }
FUSEDATTN_INLINE vec<double> load_as(const double* p) { return load(p); }

FUSEDATTN_INLINE vec<float> load_as(const bf16* p) {
#if defined(__AVX512F__)
  // Each to the upper half of its float in one step.
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const ints<float> order = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (vec<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)(order << 16),
                                                    _mm512_castsi256_si512(raw));
#elif defined(__AVX2__)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
#else
  const auto raw = *reinterpret_cast<const simd<float>::halves*>(p);
  return (vec<float>)(__builtin_convertvector(raw, ints<float>) << 16);
#endif
}

FUSEDATTN_INLINE vec<float> load_as(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vec<float> x;
  for (int i = 0; i < width<float>; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

// 2 · width consecutive elements as S; of bf16 the even ones and the odd ones, which a shift and a
// mask convert.
template <class S, class T>
FUSEDATTN_INLINE void load_pair(const T* p, vec<S>& x, vec<S>& y) {
  if constexpr (std::is_same_v<T, bf16>) {
    const auto both = load_bits<ints<float>>(p);
    x = (vec<float>)(both << 16);
    y = (vec<float>)(both & int32_t(0xffff0000));
  } else {
    x = load_as(p);
    y = load_as(p + width<S>);
  }
}

FUSEDATTN_INLINE void store_as(float* p, vec<float> x) { store(p, x); }
FUSEDATTN_INLINE void store_as(double* p, vec<double> x) { store(p, x); }

// x rounded to bf16, which is the upper half of its bits.
FUSEDATTN_INLINE ints<float> rounded_to_bf16(vec<float> x) {
  const ints<float> bits = (ints<float>)x;
  return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

FUSEDATTN_INLINE void store_as(bf16* p, vec<float> x) {
#if defined(__AVX512BF16__)
  // Takes subnormals for 0.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i kept = (__m256i)((rounded_to_bf16(x) >> 16) & 0xffff);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
  *reinterpret_cast<simd<float>::halves*>(p) =
      __builtin_convertvector(rounded_to_bf16(x) >> 16, typename simd<float>::halves);
#endif
}

FUSEDATTN_INLINE void store_as(f16* p, vec<float> x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, 0));
#else
  for (int i = 0; i < width<float>; ++i) put(p + i, x[i]);
#endif
}

// The type in which a dtype is computed.
template <class T>
struct compute {
  typedef float type;
};
template <>
struct compute<double> {
  typedef double type;
};
template <class T>
using compute_t = typename compute<T>::type;

// n elements at a stride as S, zeros up to `padded`.
template <class T, class S>
FUSEDATTN_INLINE void load_row(const T* src, int64_t stride, int64_t n, S* dst, int64_t padded) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + width<S> <= n; i += width<S>) store(dst + i, load_as(src + i));
  }
  for (; i < n; ++i) dst[i] = to_float(src[i * stride]);
  for (; i < padded; ++i) dst[i] = 0;
}

// n elements of src·factor, rounded to T, written at a stride.
template <class T, class S>
FUSEDATTN_INLINE void store_row(T* dst, int64_t stride, int64_t n, const S* src, S factor) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + width<S> <= n; i += width<S>) store_as(dst + i, load(src + i) * factor);
  }
  for (; i < n; ++i) put(dst + i * stride, src[i] * factor);
}

// A row takes −inf where the mask's byte, at a stride, is 0.
template <class S>
FUSEDATTN_INLINE void mask_row(const uint8_t* mask, int64_t stride, int64_t n, S* row) {
  int64_t i = 0;
  for (; stride == 1 && i + width<S> <= n; i += width<S>)
    store(row + i, select_bytes<S>(mask + i, load(row + i), splat(-infinity<S>)));
  for (; i < n; ++i)
    if (!mask[i * stride]) row[i] = -infinity<S>;
}

}  // namespace fusedattn::FUSEDATTN_ISA
