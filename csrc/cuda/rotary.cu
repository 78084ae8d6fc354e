// Rotary embedding on NVIDIA GPUs, bound by memory: x is read and written once, 16 bytes at a time.
//
// A row of features is cut into units of 2N, two packs of N:
//
//   half:         pairs (i, i + R/2)       one pack of each half
//   interleaved:  pairs (2i, 2i + 1)       two neighbouring packs
//   copied:       features from R on       two neighbouring packs
//
// A thread takes one unit of four heads at one position. It reads cos and sin once for all four,
// and all that it reads of x before it writes, so that `out` may be x. The heads of x2 follow those
// of x in the same launch. N is 1 where alignment, strides or sizes allow no packs.
#include "rotary.h"

#include <cmath>

#include "kernels.h"
#include "positions.cuh"

namespace fusedattn::cuda {
namespace {

constexpr int threads = 256;
constexpr int together = 4;  // heads of a thread: eight packs on their way at a time

struct RotaryWork {
  Rotary rotary;
  int64_t half;          // R/2
  int64_t turned;        // units that turn
  int64_t units;         // and those that are copied
  int64_t first_groups;  // groups of heads of x
  int64_t total;         // threads
};

// The heads of x or of x2.
struct Heads {
  const char* x;
  char* out;
  int64_t count;
  int64_t x_stride[4], out_stride[4];

  FUSEDATTN_DEVICE Heads(const TensorView& from, const TensorView& to)
      : x(static_cast<const char*>(from.data)),
        out(static_cast<char*>(to.data)),
        count(from.shape[1]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x_stride[i] = from.stride[i], out_stride[i] = to.stride[i];
  }
};

// N numbers of a table of any float dtype; next to each other if N > 1.
template <int N>
FUSEDATTN_DEVICE Pack<float, N> load_numbers(const TensorView& table, int64_t at) {
  switch (table.dtype) {
    case DType::f16:
      return widen(load<N>(static_cast<const f16*>(table.data) + at));
    case DType::bf16:
      return widen(load<N>(static_cast<const bf16*>(table.data) + at));
    case DType::f32:
      return load<N>(static_cast<const float*>(table.data) + at);
    default:
      break;
  }
  Pack<float, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i)
    result[i] = float(load(static_cast<const double*>(table.data) + at + i));
  return result;
}

// N of cos or sin from pair `first` on; NaN for a position that the table does not have.
template <int N>
FUSEDATTN_DEVICE Pack<float, N> load_row(const TensorView& table, int64_t batch, int64_t position,
                                         int64_t first) {
  if (position < 0 || !below(position, table.shape[1])) {
    Pack<float, N> unknown;
#pragma unroll
    for (int i = 0; i < N; ++i) unknown[i] = NAN;
    return unknown;
  }
  const int64_t sheet = table.shape[0] == 1 ? 0 : batch;
  return load_numbers<N>(
      table, sheet * table.stride[0] + position * table.stride[1] + first * table.stride[2]);
}

// The N pairs of a unit by N angles: (a, b) → (a·cos − b·sin, b·cos + a·sin).
template <bool interleaved, int N>
FUSEDATTN_DEVICE void turn(Pack<float, N>& left, Pack<float, N>& right, const Pack<float, N>& cos,
                           const Pack<float, N>& sin) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    constexpr bool neighbours = interleaved && N > 1;
    float& a = !neighbours ? left[i] : 2 * i < N ? left[2 * i] : right[2 * i - N];
    float& b = !neighbours ? right[i] : 2 * i < N ? left[2 * i + 1] : right[2 * i + 1 - N];
    const float before = a;
    a = fma(before, cos[i], -b * sin[i]);
    b = fma(b, cos[i], before * sin[i]);
  }
}

template <class T, int N, bool interleaved>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(threads, 2)
    rotary_kernel(const FUSEDATTN_GRID_CONSTANT RotaryWork work) {
  const Rotary& rotary = work.rotary;
  const int64_t rows = rotary.x.shape[2], dim = rotary.x.shape[3];
  int64_t index = block() * block_size() + thread();
  if (!below(index, work.total)) return;
  const int64_t unit = index % work.units;
  index /= work.units;
  const int64_t all_rows = rotary.x.shape[0] * rows;
  const int64_t row = index % all_rows % rows, batch = index % all_rows / rows;
  int64_t group = index / all_rows;
  const bool of_x = group < work.first_groups;
  const Heads heads = of_x ? Heads(rotary.x, rotary.out) : Heads(rotary.x2, rotary.out2);
  if (!of_x) group -= work.first_groups;

  const bool turns = unit < work.turned;
  const bool halves = turns && !interleaved;
  const int64_t from = turns ? 0 : 2 * (work.half - N * work.turned);
  const int64_t left = halves ? unit * N : from + unit * 2 * N;
  const int64_t right = halves ? left + work.half : left + N;
  const bool has_right = below(right, dim);  // else a copied unit is cut short
  const int64_t head = group * together;

  const T* x = reinterpret_cast<const T*>(heads.x) + batch * heads.x_stride[0] +
               head * heads.x_stride[1] + row * heads.x_stride[2];
  Pack<T, N> packs[together][2] = {};
#pragma unroll
  for (int i = 0; i < together; ++i) {
    if (!below(head + i, heads.count)) break;
    const T* at = x + i * heads.x_stride[1];
    packs[i][0] = load<N>(at + left * heads.x_stride[3]);
    if (has_right) packs[i][1] = load<N>(at + right * heads.x_stride[3]);
  }

  if (turns) {
    const int64_t position =
        position_of(rotary.positions, rotary.offset, rotary.options.offset, batch, row);
    const Pack<float, N> cos = load_row<N>(rotary.cos, batch, position, unit * N);
    Pack<float, N> sin = load_row<N>(rotary.sin, batch, position, unit * N);
#pragma unroll
    for (int i = 0; i < N; ++i) sin[i] = rotary.options.inverse ? -sin[i] : sin[i];
#pragma unroll
    for (int i = 0; i < together; ++i) {
      Pack<float, N> a = widen(packs[i][0]), b = widen(packs[i][1]);
      turn<interleaved>(a, b, cos, sin);
      packs[i][0] = narrow<T>(a), packs[i][1] = narrow<T>(b);
    }
  }

  T* out = reinterpret_cast<T*>(heads.out) + batch * heads.out_stride[0] +
           head * heads.out_stride[1] + row * heads.out_stride[2];
#pragma unroll
  for (int i = 0; i < together; ++i) {
    if (!below(head + i, heads.count)) break;
    T* at = out + i * heads.out_stride[1];
    store(at + left * heads.out_stride[3], packs[i][0]);
    if (has_right) store(at + right * heads.out_stride[3], packs[i][1]);
  }
}

bool takes_packs(const Rotary& rotary, int n) {
  const int bytes = bytes_of(rotary.x.dtype);
  for (const TensorView* view : {&rotary.x, &rotary.out, &rotary.x2, &rotary.out2})
    if (*view && !aligned(*view, 4, n, bytes)) return false;
  for (const TensorView* table : {&rotary.cos, &rotary.sin})
    if (!aligned(*table, 3, n, bytes_of(table->dtype))) return false;
  return rotary.x.shape[3] % n == 0 && rotary.cos.shape[2] % n == 0;
}

template <class T, int N>
void launch_rotary(const Rotary& rotary, Stream stream) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  RotaryWork work;
  work.rotary = rotary;
  work.half = rotary.cos.shape[2];
  work.turned = ceil_div(work.half, N);
  const bool in_place = rotary.out.data == rotary.x.data;
  const int64_t copied = in_place ? 0 : rotary.x.shape[3] - 2 * work.half;
  work.units = work.turned + ceil_div(copied, 2 * N);
  work.first_groups = ceil_div(rotary.x.shape[1], together);
  const int64_t groups =
      work.first_groups + (rotary.x2 ? ceil_div(rotary.x2.shape[1], together) : 0);
  work.total = work.units * rotary.x.shape[0] * rotary.x.shape[2] * groups;
  Launch shape;
  shape.grid = ceil_div(work.total, threads);
  shape.block = threads;
  shape.stream = stream;
  shape.device = rotary.x.device;
  if (rotary.options.interleaved)
    launch("rotary", rotary_kernel<T, N, true>, shape, work);
  else
    launch("rotary", rotary_kernel<T, N, false>, shape, work);
}

}  // namespace

void run(const Rotary& rotary, Stream stream) {
  visit(rotary.dtype(), [&](auto element) {
    using T = decltype(element);
    if (takes_packs(rotary, pack_size<T>))
      launch_rotary<T, pack_size<T>>(rotary, stream);
    else
      launch_rotary<T, 1>(rotary, stream);
  });
}

}  // namespace fusedattn::cuda
