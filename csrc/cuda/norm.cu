// Forward of layer norm and RMS norm; the maths stands in norm.h.
//
// Each element is read once and written once. A row lies in the registers of a team (a part of a
// warp, a warp, several warps), which takes the mean and then the squared distances from it. A row
// too wide for that lies in the shared memory of a block or of a cluster, which merges means and
// squared distances as it reads (Chan et al. 1979); what does not fit there is read again.
#include "dropout.cuh"
#include "kernels.h"
#include "rowwise.cuh"

namespace fusedattn::cuda {
namespace {

struct Forward {
  Matrix x, residual, weight, bias, out, z;
  float *mean, *rstd;
  Dropout dropout;
  int64_t rows;
  int width;
  float eps, weight_offset;
  bool centre;
  int team;       // threads of a row in registers
  int run, kept;  // of a wide row: the chunks of a block, and of these in shared memory
};

// z = dropout(x) + residual, rounded to its dtype, which is how it is normalised, and written.
template <int N, int K>
FUSEDATTN_DEVICE void fuse(Pack<float, N> (&z)[K], const Forward& f, int64_t row,
                           const Chunks& chunks) {
  if (f.dropout.seed != nullptr) {
    const uint64_t key = uint64_t(load(f.dropout.seed));
    chunks.each<K>([&](int k, int c) { f.dropout.apply(z[k], key, row, c * int64_t(N)); });
  }
  if (f.residual.there())
    with_type(f.residual.dtype, [&](auto type) {
      using R = decltype(type);
      Pack<R, N> residual[K];
      chunks.each<K>([&](int k, int c) {
        residual[k] = fetch_once<R, N>(f.residual, row * f.residual.stride + c * int64_t(N));
      });
      chunks.each<K>([&](int k, int) { z[k] = Add()(z[k], widen(residual[k])); });
    });
  with_type(f.z.dtype, [&](auto type) {
    chunks.each<K>([&](int k, int c) {
      z[k] = put<decltype(type)>(f.z, row * f.z.stride + c * int64_t(N), z[k]);
    });
  });
}

// out = (z − mean) · rstd · (weight_offset + weight) + bias; W is the dtype of both, or Any.
template <class T, class W, int N, int K>
FUSEDATTN_DEVICE void write(Pack<float, N> (&z)[K], float mean, float rstd, const Forward& f,
                            int64_t row, const Chunks& chunks) {
  // Each parameter is read for all chunks before it is used for the first.
  const auto with = [&](const Matrix& parameter, const auto& function) {
    Pack<Held<W>, N> read[K];
    chunks.each<K>([&](int k, int c) { read[k] = fetch<W, N>(parameter, c * int64_t(N)); });
    chunks.each<K>([&](int k, int) {
#pragma unroll
      for (int i = 0; i < N; ++i) z[k][i] = function(z[k][i], to_float(read[k][i]));
    });
  };
  chunks.each<K>([&](int k, int) {
#pragma unroll
    for (int i = 0; i < N; ++i) z[k][i] = (z[k][i] - mean) * rstd;
  });
  if (f.weight.there())
    with(f.weight, [&](float x, float weight) { return x * (weight + f.weight_offset); });
  if (f.bias.there()) with(f.bias, [](float x, float bias) { return x + bias; });
  chunks.each<K>([&](int k, int c) { put<T>(f.out, row * f.out.stride + c * int64_t(N), z[k]); });
}

template <class T, int N, int K>
FUSEDATTN_DEVICE void write(Pack<float, N> (&z)[K], float mean, float rstd, const Forward& f,
                            int64_t row, const Chunks& chunks) {
  if (f.weight.dtype == f.bias.dtype)
    with_type(f.weight.dtype,
              [&](auto type) { write<T, decltype(type)>(z, mean, rstd, f, row, chunks); });
  else
    write<T, Any>(z, mean, rstd, f, row, chunks);
}

// A row to a team; `fused`: z is not x itself.
template <class T, int N, int K, bool fused>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(max_threads, 2)
    norm_forward_rows(const FUSEDATTN_GRID_CONSTANT Forward f) {
  Team team(f.team);
  const int64_t row = block() * (block_size() / team.size) + team.index;
  const Chunks chunks{team.rank, team.size, below(row, f.rows) ? f.width / N : 0};
  Pack<Held<T>, N> x[K];
  Pack<float, N> z[K];
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = {};
  chunks.each<K>(
      [&](int k, int c) { x[k] = fetch_once<T, N>(f.x, row * f.x.stride + c * int64_t(N)); });
#pragma unroll
  for (int k = 0; k < K; ++k) z[k] = widen(x[k]);
  if constexpr (fused)
    if (f.z.there()) fuse(z, f, row, chunks);

  const float scale = 1.0f / float(f.width);
  float mean = 0.0f;
  if (f.centre) {
    Pack<float, 1> sum = {};
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < N; ++i) sum[0] += z[k][i];
    mean = team.reduce(sum, Add())[0] * scale;
  }
  Pack<float, 1> squares = {};
  chunks.each<K>([&](int k, int) {
#pragma unroll
    for (int i = 0; i < N; ++i) squares[0] += (z[k][i] - mean) * (z[k][i] - mean);
  });
  const float variance = team.reduce(squares, Add())[0] * scale;
  const float rstd = reciprocal(sqrt(variance + f.eps));
  if (!below(row, f.rows)) return;
  if (team.rank == 0) {
    if (f.mean != nullptr) store(f.mean + row, mean);
    if (f.rstd != nullptr) store(f.rstd + row, rstd);
  }
  write<T>(z, mean, rstd, f, row, chunks);
}

// --- wide rows -----------------------------------------------------------------------------------

// Count, mean and sum of squared distances from it, of some elements of a row.
using Moments = Pack<float, 4>;

struct MergeMoments {
  FUSEDATTN_DEVICE Moments operator()(const Moments& a, const Moments& b) const {
    const float count = a[0] + b[0];
    const float share = count > 0.0f ? 1.0f / count : 0.0f;
    const float apart = b[1] - a[1];
    return {{count, a[1] + apart * (b[0] * share),
             a[2] + b[2] + apart * apart * (a[0] * (b[0] * share)), 0.0f}};
  }
};

template <int N>
FUSEDATTN_DEVICE Moments moments_of(const Pack<float, N>& x) {
  float mean = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) mean += x[i] * (1.0f / N);
#pragma unroll
  for (int i = 0; i < N; ++i) squares += (x[i] - mean) * (x[i] - mean);
  return {{float(N), mean, squares, 0.0f}};
}

// A row to a block, or to a cluster.
template <class T, int N, bool fused>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(max_threads, 2)
    norm_forward_wide(const FUSEDATTN_GRID_CONSTANT Forward f) {
  constexpr int K = fused ? 1 : N == 8 ? 2 : 4;  // chunks under way at a time
  const int64_t row = block() / cluster_size();
  const int begin = cluster_rank() * f.run, all = f.width / N;
  const int end = begin + f.run < all ? begin + f.run : all;
  auto* kept = reinterpret_cast<Pack<float, N>*>(shared_memory() + reduction_bytes);
  if (cluster_size() > 1) sync_cluster();  // all blocks must run before one writes to another

  Moments moments = {};
  for (int first = begin + thread(); first < end; first += K * block_size()) {
    const Chunks chunks{first, block_size(), end};
    Pack<float, N> z[K];
    Pack<Held<T>, N> x[K];
    chunks.each<K>(
        [&](int k, int c) { x[k] = fetch<T, N>(f.x, row * f.x.stride + c * int64_t(N)); });
    chunks.each<K>([&](int k, int) { z[k] = widen(x[k]); });
    if constexpr (fused)
      if (f.z.there()) fuse(z, f, row, chunks);
    chunks.each<K>([&](int k, int c) {
      moments = MergeMoments()(moments, moments_of(z[k]));
      if (below(c - begin, f.kept)) store_shared(kept + (c - begin), z[k]);
    });
  }
  moments = Team(block_size()).reduce(moments, MergeMoments());
  const float mean = f.centre ? moments[1] : 0.0f;
  const float variance = moments[2] / float(f.width) + (f.centre ? 0.0f : moments[1] * moments[1]);
  const float rstd = reciprocal(sqrt(variance + f.eps));
  if (thread() == 0 && cluster_rank() == 0) {
    if (f.mean != nullptr) store(f.mean + row, mean);
    if (f.rstd != nullptr) store(f.rstd + row, rstd);
  }
  for (int c = begin + thread(); below(c, end); c += block_size()) {
    Pack<float, N> z[1];
    if (below(c - begin, f.kept))
      z[0] = load_shared(kept + (c - begin));
    else if (fused && f.z.there())
      z[0] = fetch<Any, N>(f.z, row * f.z.stride + c * int64_t(N));
    else
      z[0] = widen(fetch<T, N>(f.x, row * f.x.stride + c * int64_t(N)));
    write<T>(z, mean, rstd, f, row, Chunks{c, 1, c + 1});
  }
}

// --- choice --------------------------------------------------------------------------------------

// Single elements have one kernel for both: fewer to compile.
template <class T>
constexpr bool always = std::is_same_v<T, Any>;

template <class T, int N, int K>
void launch_rows(Forward f, Launch shape) {
  const TeamShape teams = team_shape(f.width / N, K, 128);
  f.team = teams.team;
  shape.block = teams.team * teams.teams;
  shape.grid = (f.rows + teams.teams - 1) / teams.teams;
  shape.shared_bytes = reduction_bytes;
  const auto kernel = f.z.data != nullptr ? norm_forward_rows<T, N, K, true>
                                          : norm_forward_rows<T, N, K, always<T>>;
  launch("norm_forward_rows", kernel, shape, f);
}

template <class T, int N>
void launch_forward(Forward f, Launch shape) {
  constexpr int most = N == 1 ? 4 : 16 / N;  // chunks of a thread
  const int64_t chunks = f.width / N;
  if (chunks <= warp_size) return launch_rows<T, N, 1>(f, shape);
  if (chunks <= max_threads * most) return launch_rows<T, N, most>(f, shape);
  const WideShape wide = wide_shape(chunks, N * int(sizeof(float)), shape.device);
  f.run = wide.run;
  f.kept = wide.kept;
  shape.block = max_threads;
  shape.cluster = wide.cluster;
  shape.grid = f.rows * wide.cluster;
  shape.shared_bytes = wide.shared_bytes;
  const auto kernel =
      f.z.data != nullptr ? norm_forward_wide<T, N, true> : norm_forward_wide<T, N, always<T>>;
  launch("norm_forward_wide", kernel, shape, f);
}

}  // namespace

void run(const NormForward& p, Stream stream) {
  check_dtypes({&p.residual, &p.weight, &p.bias, &p.z});
  check_count(p.width(), "columns");
  Forward f;
  f.x = matrix(p.x);
  f.residual = matrix(p.residual);
  f.weight = matrix(p.weight);
  f.bias = matrix(p.bias);
  f.out = matrix(p.out);
  f.z = matrix(p.z);
  if (!p.weight) f.weight.dtype = f.bias.dtype;
  if (!p.bias) f.bias.dtype = f.weight.dtype;
  f.mean = static_cast<float*>(p.mean.data);
  f.rstd = static_cast<float*>(p.rstd.data);
  f.dropout = dropout(p.seed, p.options.dropout_p);
  f.rows = p.rows();
  f.width = int(p.width());
  f.eps = float(p.options.eps);
  f.weight_offset = float(p.options.weight_offset);
  f.centre = p.options.centre;
  Launch shape;
  shape.stream = stream;
  shape.device = p.x.device;
  visit(p.x.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = pack_size<T>;
    const bool in_chunks = p.width() % N == 0 && takes_chunks(p.x, 2, N) &&
                           takes_chunks(p.residual, 2, N) && takes_chunks(p.out, 2, N) &&
                           takes_chunks(p.z, 2, N) && takes_chunks(p.weight, 1, N) &&
                           takes_chunks(p.bias, 1, N);
    if (in_chunks)
      launch_forward<T, N>(f, shape);
    else
      launch_forward<Any, 1>(f, shape);
  });
}

}  // namespace fusedattn::cuda
