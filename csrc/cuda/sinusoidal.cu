// Sinusoidal positions on NVIDIA GPUs, added in one pass: x is read and written once, 16 bytes at a
// time, and no table is read.
//
// p / base^(2i/W) radians are p·f turns with f = base^(−2i/W) / 2π. Only the fraction of a turn
// matters, so f is held as a 64-bit fixed-point fraction and p·f is an integer product that wraps
// around: exact, however large p is.
//
// A thread takes N columns of four rows in several batch elements, which share their encoding
// unless each has its own positions. fp64 is slow on most GPUs: a thread computes one exp2, and
// the frequencies of its other columns by a constant factor from each to the next.
#include "sinusoidal.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "positions.cuh"

namespace fusedattn::cuda {
namespace {

constexpr int threads = 256;
constexpr int rows_together = 4;
constexpr int batches_together = 8;

struct SinusoidalWork {
  Sinusoidal sinusoidal;
  double exponent;  // −2·log₂(base) / W
  double step;      // exp2(exponent)
  float scale;
  int64_t chunks;  // of N columns
  int64_t tiles;   // of rows_together rows
  int64_t share;   // batch elements of a thread
  int64_t total;   // threads
};

// sin and cos of a phase in turns, a fraction of 2⁶⁴, to an fp32 ulp. What remains after whole
// quarters is |t| ≤ 1/8 turn, where sin 2πt = 2πt + t·u(s0 + s1·u + s2·u²) and
// cos 2πt = 1 + u(c0 + …) with u = t², fitted at Chebyshev points; 2π is split in two so that its
// rounding does not count.
FUSEDATTN_DEVICE void sincos_turns(uint64_t phase, float* sine, float* cosine) {
  const uint64_t quarter = (phase + (uint64_t(1) << 61)) >> 62;
  const float t = float(int64_t(phase - (quarter << 62))) * 0x1p-64f;
  const float u = t * t;
  float sin = fma(u, -75.72653198242188f, 81.59952545166016f);
  sin = fma(sin, u, -41.341697692871094f);
  sin = fma(sin, u, -1.7484555314695172e-07f);
  sin = fma(t, 6.2831854820251465f, t * sin);
  float cos = fma(u, 59.424224853515625f, -85.44882202148438f);
  cos = fma(cos, u, 64.93936920166016f);
  cos = fma(cos, u, -19.739208221435547f);
  cos = fma(cos, u, 1.0f);
  const int q = int(quarter);
  const float turned_sin = q & 1 ? cos : sin, turned_cos = q & 1 ? sin : cos;
  *sine = q & 2 ? -turned_sin : turned_sin;
  *cosine = (q + 1) & 2 ? -turned_cos : turned_cos;
}

// Turns as a fraction of 2⁶⁴, whole turns taken off.
FUSEDATTN_DEVICE uint64_t fixed_point(double turns) {
  return uint64_t(int64_t((turns - ::floor(turns + 0.5)) * 0x1p64));
}

// N columns of a row, those below `width`; next to each other if `packed`.
template <class T, int N, bool packed>
FUSEDATTN_DEVICE Pack<T, N> load_columns(const T* row, int64_t first, int64_t width,
                                         int64_t stride) {
  if constexpr (packed) return load<N>(row + first);
  Pack<T, N> result = {};
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (first + i < width) result[i] = load(row + (first + i) * stride);
  return result;
}

template <class T, int N, bool packed>
FUSEDATTN_DEVICE void store_columns(T* row, int64_t first, int64_t width, int64_t stride,
                                    const Pack<T, N>& values) {
  if constexpr (packed) {
    store(row + first, values);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (first + i < width) store(row + (first + i) * stride, values[i]);
  }
}

template <class T, int N, bool packed>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(threads, 2)
    sinusoidal_kernel(const FUSEDATTN_GRID_CONSTANT SinusoidalWork work) {
  const Sinusoidal& op = work.sinusoidal;
  const int64_t batches = op.x.shape[0], rows = op.x.shape[1], width = op.x.shape[2];
  int64_t index = block() * block_size() + thread();
  if (index >= work.total) return;
  const int64_t column = index % work.chunks * N;
  index /= work.chunks;
  const int64_t first_row = index % work.tiles * rows_together;
  const int64_t first_batch = index / work.tiles * work.share;
  const int count = int(rows - first_row < rows_together ? rows - first_row : rows_together);

  const auto load_batch = [&](int64_t batch, Pack<T, N>(&values)[rows_together]) {
    const T* x = op.x.at<T>(batch, first_row);
#pragma unroll
    for (int i = 0; i < rows_together; ++i)
      if (i < count)
        values[i] =
            load_columns<T, N, packed>(x + i * op.x.stride[1], column, width, op.x.stride[2]);
  };
  // Always one batch element ahead: the first is on its way while the encoding is computed.
  Pack<T, N> values[rows_together] = {};
  load_batch(first_batch, values);

  uint64_t frequency[N / 2];
  double turns = ::exp2(double(column / 2) * work.exponent) * 0.15915494309189535;
#pragma unroll
  for (int i = 0; i < N / 2; ++i, turns *= work.step) frequency[i] = fixed_point(turns);
  Pack<float, N> encoding[rows_together];
#pragma unroll
  for (int i = 0; i < rows_together; ++i) {
    const int64_t row = first_row + (i < count ? i : 0);
    const int64_t position =
        position_of(op.positions, op.offset, op.options.offset, first_batch, row);
#pragma unroll
    for (int j = 0; j < N / 2; ++j)
      sincos_turns(uint64_t(position) * frequency[j], &encoding[i][2 * j], &encoding[i][2 * j + 1]);
  }

  const int64_t end = first_batch + work.share < batches ? first_batch + work.share : batches;
  for (int64_t batch = first_batch; batch < end; ++batch) {
    Pack<T, N> ahead[rows_together] = {};
    if (batch + 1 < end) load_batch(batch + 1, ahead);
    T* out = op.out.at<T>(batch, first_row);
#pragma unroll
    for (int i = 0; i < rows_together; ++i) {
      Pack<float, N> sum = widen(values[i]);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] = fma(sum[j], work.scale, encoding[i][j]);
      if (i < count)
        store_columns<T, N, packed>(out + i * op.out.stride[1], column, width, op.out.stride[2],
                                    narrow<T>(sum));
      values[i] = ahead[i];
    }
  }
}

template <class T, int N, bool packed>
void launch_sinusoidal(const Sinusoidal& op, Stream stream) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t batches = op.x.shape[0], width = op.x.shape[2];
  SinusoidalWork work;
  work.sinusoidal = op;
  work.exponent = -2.0 * std::log2(op.options.base) / double(width);
  work.step = std::exp2(work.exponent);
  work.scale = float(op.options.scale);
  work.chunks = ceil_div(width, N);
  work.tiles = ceil_div(op.x.shape[1], rows_together);
  const bool own_positions = op.positions && op.positions.shape[0] > 1;
  work.share = own_positions ? 1 : std::min<int64_t>(batches, batches_together);
  work.total = work.chunks * work.tiles * ceil_div(batches, work.share);
  Launch shape;
  shape.grid = ceil_div(work.total, threads);
  shape.block = threads;
  shape.stream = stream;
  shape.device = op.x.device;
  launch("sinusoidal", sinusoidal_kernel<T, N, packed>, shape, work);
}

}  // namespace

void run(const Sinusoidal& op, Stream stream) {
  visit(op.dtype(), [&](auto element) {
    using T = decltype(element);
    constexpr int n = pack_size<T>;
    if (op.x.shape[2] % n == 0 && aligned(op.x, 3, n, sizeof(T)) &&
        aligned(op.out, 3, n, sizeof(T)))
      launch_sinusoidal<T, n, true>(op, stream);
    else
      launch_sinusoidal<T, 2, false>(op, stream);
  });
}

}  // namespace fusedattn::cuda
