// Sinusoidal positions: out[b, i, 2j] = scale · x + sin(p / base^(2j/W)), cos in the odd features.
//
// The phase p / base^(2j/W) is fp64. For fp32 results it is cut, in fp64, into n quarter turns and
// a rest |r| <= π/4; r goes to fp32 with its relative accuracy kept, and polynomials give its sin
// and cos, which n swaps and negates. A row of the encoding is computed once for all batches that
// share its position.
#include "sinusoidal.h"

#include "dtypes.h"
#include "positions.h"
#include "workspace.h"

namespace fusedattn::FUSEDATTN_ISA {

// The low halves of the elements of a, then of b.
FUSEDATTN_INLINE ints<float> narrow(ints<double> a, ints<double> b) {
  ints<float> even;
  for (int i = 0; i < width<float>; ++i) even[i] = 2 * i;
  return __builtin_shuffle((ints<float>)a, (ints<float>)b, even);
}

FUSEDATTN_INLINE vec<float> narrow(vec<double> a, vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a)), _mm512_cvtpd_ps(b), 1);
#elif defined(__AVX2__)
  return _mm256_set_m128(_mm256_cvtpd_ps(b), _mm256_cvtpd_ps(a));
#else
  vec<float> x;
  for (int i = 0; i < width<double>; ++i) x[i] = float(a[i]), x[width<double> + i] = float(b[i]);
  return x;
#endif
}

// From here on `reduce`, with π/2 as one double, is too coarse for results in fp32.
constexpr double far_phase = 0x1p27;

// A phase as n quarter turns and r, |r| <= π/4: r, and n in the low bits of `turns`.
FUSEDATTN_INLINE vec<double> reduce(vec<double> phase, ints<double>& turns) {
  constexpr double per_radian = 0.63661977236758134308, quarter = 1.57079632679489661923;
  constexpr double magic = 6755399441055744.0;  // 1.5·2⁵²: the sum rounds to an integer
  const vec<double> shifted = phase * per_radian + magic;
  turns = (ints<double>)shifted;
  return phase - (shifted - magic) * quarter;
}

// sin and cos of n quarter turns and r, by minimax polynomials that err by 4e-9 and 1e-10. The last
// step of each adds a small term, so that little but its own rounding is left.
FUSEDATTN_INLINE void sin_cos(vec<float> r, ints<float> n, vec<float>& sin, vec<float>& cos) {
  const vec<float> u = r * r;
  vec<float> s = splat(-1.95172981447276926e-4f);
  s = s * u + 8.33217814012910735e-3f;
  s = s * u - 1.66666549436087078e-1f;
  s = s * (u * r) + r;
  vec<float> c = splat(2.44384507029279705e-5f);
  c = c * u - 1.38873675083164012e-3f;
  c = c * u + 4.16666468662990912e-2f;
  c = c * u - 0.5f;
  c = c * u + 1.0f;
  const ints<float> odd = -(n & 1);
  const vec<float> swapped = odd ? c : s;
  cos = (vec<float>)((ints<float>)(odd ? s : c) ^ (((n + 1) & 2) << 30));
  sin = (vec<float>)((ints<float>)swapped ^ ((n & 2) << 30));
}

template <class S>
FUSEDATTN_INLINE void encode_apart(double position, const double* frequency, int64_t pairs, S* to) {
  for (int64_t j = 0; j < pairs; ++j) {
    to[2 * j] = S(__builtin_sin(position * frequency[j]));
    to[2 * j + 1] = S(__builtin_cos(position * frequency[j]));
  }
}

// The encoding of one position, with room for whole vectors at its end. Frequencies only rise, or
// only fall.
FUSEDATTN_INLINE void encode(double position, const double* frequency, int64_t pairs, float* to) {
  constexpr int n = width<float>;
  const double first = frequency[0], last = frequency[pairs - 1];
  if (position * (first > last ? first : last) >= far_phase)
    return encode_apart(position, frequency, pairs, to);
  ints<float> low, high;
  for (int i = 0; i < n; ++i) {
    low[i] = i / 2 + i % 2 * n;
    high[i] = low[i] + n / 2;
  }
  for (int64_t j = 0; j < pairs; j += n) {
    ints<double> turns[2];
    vec<double> part[2];
    for (int k = 0; k < 2; ++k)
      part[k] = reduce(position * load(frequency + j + k * (n / 2)), turns[k]);
    vec<float> sin, cos;
    sin_cos(narrow(part[0], part[1]), narrow(turns[0], turns[1]), sin, cos);
    store(to + 2 * j, __builtin_shuffle(sin, cos, low));
    store(to + 2 * j + n, __builtin_shuffle(sin, cos, high));
  }
}

FUSEDATTN_INLINE void encode(double position, const double* frequency, int64_t pairs, double* to) {
  encode_apart(position, frequency, pairs, to);
}

// base^(−2j/W) for j < pairs, zeros up to `padded`. For fp32 results one power in sixteen and a
// product for the others: two roundings of fp64.
FUSEDATTN_INLINE void fill_frequencies(double* to, const Sinusoidal& f, int64_t pairs,
                                       int64_t padded) {
  constexpr int64_t run = 16;
  const double width = double(f.x.shape[2]);
  double step[run];
  const int64_t stride = f.dtype() == DType::f64 ? 1 : run;
  for (int64_t j = 0; j < stride; ++j)
    step[j] = j < pairs ? __builtin_pow(f.options.base, -2.0 * double(j) / width) : 1.0;
  for (int64_t first = 0; first < pairs; first += stride) {
    const double power = __builtin_pow(f.options.base, -2.0 * double(first) / width);
    for (int64_t j = 0; j < stride && first + j < pairs; ++j) to[first + j] = power * step[j];
  }
  for (int64_t j = pairs; j < padded; ++j) to[j] = 0.0;
}

// out = scale · x + encoding, for a row of n features.
template <class T, class S>
FUSEDATTN_INLINE void add_row(const T* x, int64_t step, T* out, int64_t out_step, int64_t n,
                              const S* encoding, S scale) {
  int64_t j = 0;
  if (step == 1 && out_step == 1)
    for (; j + width<S> <= n; j += width<S>)
      store_as(out + j, load_as(x + j) * scale + load(encoding + j));
  for (; j < n; ++j) put(out + j * out_step, to_float(x[j * step]) * scale + encoding[j]);
}

template <class T>
static bool sinusoidal(const Sinusoidal& f) {
  typedef compute_t<T> S;
  const int64_t batch = f.x.shape[0], length = f.x.shape[1], features = f.x.shape[2];
  const int64_t pairs = (features + 1) / 2, padded = (pairs + 15) / 16 * 16;
  const int threads = threads_for_elements(f.work());
  const Positions positions(f.positions, f.offset, f.options.offset);
  const bool shared = positions.shared();
  const int64_t rows = batch * length;

  Arena count;
  count.take<double>(padded);
  const size_t table = count.used();
  count.take<S>(2 * padded);
  const size_t own_bytes = count.used() - table;
  const Workspace workspace(table, own_bytes, threads);
  double* frequency = workspace.shared().take<double>(padded);
  fill_frequencies(frequency, f, pairs, padded);
  on_threads(threads, [&] {
    const int own = omp_get_thread_num(), all = omp_get_num_threads();
    S* encoding = workspace.own(own).take<S>(2 * padded);
    int64_t encoded = -1;
    for (int64_t t = rows * own / all; t < rows * (own + 1) / all; ++t) {
      // Batches that share a position follow each other.
      const int64_t b = shared ? t % batch : t / length;
      const int64_t i = shared ? t / batch : t % length;
      if (!shared || i != encoded) encode(double(positions.at(b, i)), frequency, pairs, encoding);
      encoded = i;
      add_row(f.x.at<T>(b, i), f.x.stride[2], f.out.at<T>(b, i), f.out.stride[2], features,
              encoding, S(f.options.scale));
    }
  });
  return true;
}

SinusoidalKernels sinusoidal_kernels() {
  return by_dtype<SinusoidalKernels>([]<class T>(SinusoidalKernels& kernels, DType dtype) {
    kernel_for<Sinusoidal>(kernels, dtype) = {sinusoidal<T>};
  });
}

}  // namespace fusedattn::FUSEDATTN_ISA
