// Backward of layer norm and RMS norm. With n = (z − mean) · rstd and g = dout · (weight_offset +
// weight), over rows of width W:
//
//   dresidual = rstd · (g − n · Σ(g · n) / W − Σg / W) + dz, without Σg for RMS norm
//   dx = dropout'(dresidual)        dweight = Σ_rows dout · n        dbias = Σ_rows dout
//
// Each element is read once and written once while the width fits the registers of a block, or of
// the blocks of a cluster. These stay and go from row to row, the next row under way while this one
// is reduced, and every thread sums dweight and dbias of its own columns; the sums of all blocks
// meet in a workspace, which a second kernel adds up in a fixed order. Wider rows, and rows that do
// not come in chunks, are read twice: for the two sums of a row, then in strips of columns.
#include "dropout.cuh"
#include "kernels.h"
#include "rowwise.cuh"

namespace fusedattn::cuda {
namespace {

constexpr int strip_threads = 256;

struct Backward {
  Matrix dout, dz, z, weight, dx, dresidual;
  const float *mean, *rstd;
  Dropout dropout;
  int64_t rows;
  int width;
  float weight_offset;
  bool centre;
  int team;         // threads of a row
  int run;          // chunks of a block of the cluster, or of a slice of a row read twice
  int slices;       // of a row, each with its own part of the two sums
  int64_t share;    // rows of a block of a strip
  float* sums;      // (rows, slices, 2): Σ(g · n), Σg
  float* partials;  // (parts, 2, width): Σ dout · n, Σ dout; absent where neither is wanted
};

// The statistics of a row, and the means of g · n and of g.
struct Row {
  float mean = 0.0f, rstd = 0.0f, gn = 0.0f, g = 0.0f;

  FUSEDATTN_DEVICE float normalised(float z) const { return (z - mean) * rstd; }

  FUSEDATTN_DEVICE void set_means(const Backward& b, const Pack<float, 2>& sums) {
    gn = sums[0] / float(b.width);
    if (b.centre) g = sums[1] / float(b.width);
  }
};

FUSEDATTN_DEVICE Row statistics(const Backward& b, int64_t row) {
  Row result;
  if (b.centre) result.mean = load(b.mean + row);
  result.rstd = load(b.rstd + row);
  return result;
}

// The gradient of z at some elements, but for what dz adds.
template <int N>
FUSEDATTN_DEVICE Pack<float, N> through_norm(const Row& r, const Pack<float, N>& dout,
                                             const Pack<float, N>& weight,
                                             const Pack<float, N>& z) {
  Pack<float, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i)
    result[i] = r.rstd * (dout[i] * weight[i] - r.normalised(z[i]) * r.gn - r.g);
  return result;
}

// Writes dx and, where fused, dresidual, `total` being the gradient of z; T is the dtype of dx.
template <class T, bool fused, int N>
FUSEDATTN_DEVICE void write(const Backward& b, int64_t row, int64_t column, Pack<float, N> total) {
  if constexpr (fused) {
    if (b.dresidual.there()) put<Any>(b.dresidual, row * b.dresidual.stride + column, total);
    if (b.dropout.seed != nullptr)
      b.dropout.apply(total, uint64_t(load(b.dropout.seed)), row, column);
  }
  put<T>(b.dx, row * b.dx.stride + column, total);
}

// weight_offset + weight, or 1 without a weight.
template <int N>
FUSEDATTN_DEVICE Pack<float, N> weights(const Backward& b, int64_t column) {
  Pack<float, N> result = filled<float, N>(1.0f);
  if (!b.weight.there()) return result;
  result = fetch<Any, N>(b.weight, column);
#pragma unroll
  for (int i = 0; i < N; ++i) result[i] += b.weight_offset;
  return result;
}

// --- rows in registers ---------------------------------------------------------------------------

// The chunks of dout and z of one row.
template <class T, class Z, int N, int K>
struct Inputs {
  Pack<T, N> dout[K];
  Pack<Z, N> z[K];
  Row row;

  FUSEDATTN_DEVICE void read(const Backward& b, int64_t number, const Chunks& chunks) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      dout[k] = {};
      z[k] = {};
    }
    row = Row();
    if (!below(number, b.rows)) return;
    row = statistics(b, number);
    chunks.each<K>([&](int k, int c) {
      z[k] = fetch_once<Z, N>(b.z, number * b.z.stride + c * int64_t(N));
      if (b.dout.there())
        dout[k] = fetch_once<T, N>(b.dout, number * b.dout.stride + c * int64_t(N));
    });
  }
};

// The sums over rows, of one thread's columns.
template <int N, int K>
struct ColumnSums {
  Pack<float, N> weight[K] = {}, bias[K] = {};

  FUSEDATTN_DEVICE void add(int k, const Row& row, const Pack<float, N>& dout,
                            const Pack<float, N>& z) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      weight[k][i] += dout[i] * row.normalised(z[i]);
      bias[k][i] += dout[i];
    }
  }

  // Adds up those of the teams of a block, pairwise, in the first. `memory`, shared, has room for
  // the columns of half of the teams.
  FUSEDATTN_DEVICE void across_teams(const Team& team, char* memory, const Chunks& chunks) {
    for (int half = block_size() / team.size / 2; half > 0; half /= 2) {
      auto* slot = reinterpret_cast<Pack<float, N>*>(memory) +
                   (team.index - (team.index < half ? 0 : half)) * 2 * chunks.end;
      sync_block();
      if (team.index >= half && team.index < 2 * half)
        chunks.each<K>([&](int k, int c) {
          store_shared(slot + c, weight[k]);
          store_shared(slot + chunks.end + c, bias[k]);
        });
      sync_block();
      if (team.index < half)
        chunks.each<K>([&](int k, int c) {
          weight[k] = Add()(weight[k], load_shared(slot + c));
          bias[k] = Add()(bias[k], load_shared(slot + chunks.end + c));
        });
    }
  }

  FUSEDATTN_DEVICE void write(const Backward& b, int64_t part, const Chunks& chunks) const {
    float* to = b.partials + part * 2 * b.width;
    chunks.each<K>([&](int k, int c) {
      store(to + c * int64_t(N), weight[k]);
      store(to + b.width + c * int64_t(N), bias[k]);
    });
  }
};

// Writes the gradients of a row whose sums are known, and adds to the sums over rows.
template <bool fused, class T, class Z, int N, int K>
FUSEDATTN_DEVICE void finish(const Backward& b, int64_t number, const Inputs<T, Z, N, K>& inputs,
                             const Pack<float, N>* weight, ColumnSums<N, K>& columns,
                             const Chunks& chunks) {
  constexpr int group = 8 / N;  // all of dz at once would not fit the registers
#pragma unroll
  for (int from = 0; from < K; from += group) {
    const Chunks some{chunks.first + from * chunks.step, chunks.step, chunks.end};
    Pack<Z, N> dz[group];
    if (fused && b.dz.there())
      some.each<group>([&](int k, int c) {
        dz[k] = fetch_once<Z, N>(b.dz, number * b.dz.stride + c * int64_t(N));
      });
    some.each<group>([&](int k, int c) {
      const Pack<float, N> dout = widen(inputs.dout[from + k]), z = widen(inputs.z[from + k]);
      columns.add(from + k, inputs.row, dout, z);
      Pack<float, N> total = through_norm(inputs.row, dout, load_shared(weight + c), z);
      if (fused && b.dz.there()) total = Add()(total, widen(dz[k]));
      write<T, fused>(b, number, c * int64_t(N), total);
    });
  }
}

// `fused`: with dz, dresidual or dropout.
template <class T, class Z, int N, int K, bool fused>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(max_threads, 1)
    norm_backward_rows(const FUSEDATTN_GRID_CONSTANT Backward b) {
  // Read a row ahead, where the registers hold two.
  constexpr bool ahead = sizeof(Z) == 2 || !fused;
  Team team(b.team);
  const int teams = block_size() / team.size;
  const int begin = cluster_rank() * b.run, all = b.width / N;
  const int end = begin + b.run < all ? begin + b.run : all;
  const Chunks chunks{begin + team.rank, team.size, end};
  auto* weight = reinterpret_cast<Pack<float, N>*>(shared_memory() + reduction_bytes) - begin;
  for (int c = begin + thread(); below(c, end); c += block_size())
    store_shared(weight + c, weights<N>(b, c * int64_t(N)));
  sync_cluster();  // and all blocks must run before one writes to another

  const int64_t part = block() / cluster_size(), step = grid_size() / cluster_size() * teams;
  Inputs<T, Z, N, K> now, next;
  ColumnSums<N, K> columns;
  int64_t first = part * teams;
  if constexpr (ahead) now.read(b, first + team.index, chunks);
  for (; first < b.rows; first += step) {
    const int64_t number = first + team.index;
    if constexpr (ahead)
      next.read(b, number + step, chunks);
    else
      now.read(b, number, chunks);
    Pack<float, 2> sums = {};
    chunks.each<K>([&](int k, int c) {
      const Pack<float, N> dout = widen(now.dout[k]), z = widen(now.z[k]);
      const Pack<float, N> w = load_shared(weight + c);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sums[0] += dout[i] * w[i] * now.row.normalised(z[i]);
        sums[1] += dout[i] * w[i];
      }
    });
    sums = team.reduce(sums, Add());
    now.row.set_means(b, sums);
    if (below(number, b.rows)) finish<fused>(b, number, now, weight, columns, chunks);
    if constexpr (ahead) now = next;
  }
  if (b.partials == nullptr) return;
  columns.across_teams(team, shared_memory() + reduction_bytes, chunks);
  if (team.index == 0) columns.write(b, part, chunks);
}

// --- rows read twice -----------------------------------------------------------------------------

// The two sums of a slice of a row, by a team.
template <int N>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(max_threads, 1)
    norm_backward_sums(const FUSEDATTN_GRID_CONSTANT Backward b) {
  Team team(b.team);
  const int64_t number = block() * (block_size() / team.size) + team.index;
  const int64_t row = number / b.slices;
  const int begin = int(number % b.slices) * b.run, all = b.width / N;
  const int end = begin + b.run < all ? begin + b.run : all;
  Pack<float, 2> sums = {};
  if (below(row, b.rows) && b.dout.there()) {
    const Row r = statistics(b, row);
    for (int c = begin + team.rank; below(c, end); c += team.size) {
      const auto dout = fetch<Any, N>(b.dout, row * b.dout.stride + c * int64_t(N));
      const auto z = fetch<Any, N>(b.z, row * b.z.stride + c * int64_t(N));
      const auto weight = weights<N>(b, c * int64_t(N));
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sums[0] += dout[i] * weight[i] * r.normalised(z[i]);
        sums[1] += dout[i] * weight[i];
      }
    }
  }
  sums = team.reduce(sums, Add());
  if (below(row, b.rows) && team.rank == 0) store(b.sums + number * 2, sums);
}

// A strip of columns, one chunk to a thread, over `share` rows.
template <int N>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(strip_threads, 3)
    norm_backward_strips(const FUSEDATTN_GRID_CONSTANT Backward b) {
  const int all = b.width / N;
  const int strips = (all + block_size() - 1) / block_size();
  const int64_t part = block() / strips;
  const int c = int(block() % strips) * block_size() + thread();
  if (!below(c, all)) return;
  const int64_t column = c * int64_t(N), begin = part * b.share;
  const int64_t end = begin + b.share < b.rows ? begin + b.share : b.rows;
  const Pack<float, N> weight = weights<N>(b, column);
  ColumnSums<N, 1> columns;
  for (int64_t row = begin; below(row, end); ++row) {
    Row r = statistics(b, row);
    Pack<float, 2> sums = {};
    for (int slice = 0; below(slice, b.slices); ++slice)
      sums = Add()(sums, load<2>(b.sums + (row * b.slices + slice) * 2));
    r.set_means(b, sums);
    const auto z = fetch<Any, N>(b.z, row * b.z.stride + column);
    Pack<float, N> dout = {};
    if (b.dout.there()) dout = fetch<Any, N>(b.dout, row * b.dout.stride + column);
    Pack<float, N> total = through_norm(r, dout, weight, z);
    if (b.dz.there()) total = Add()(total, fetch<Any, N>(b.dz, row * b.dz.stride + column));
    write<Any, true>(b, row, column, total);
    columns.add(0, r, dout, z);
  }
  if (b.partials != nullptr) columns.write(b, part, Chunks{c, 1, c + 1});
}

// --- the sums over rows --------------------------------------------------------------------------

// dweight and dbias, side by side, from the sums of all parts: a lane to a column, a warp to every
// eighth part.
constexpr int column_warps = 8;

struct Columns {
  const float* partials;
  int64_t parts;
  int width;
  Matrix dweight, dbias;
};

FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(column_warps* warp_size, 2)
    norm_backward_columns(const FUSEDATTN_GRID_CONSTANT Columns s) {
  const int64_t column = block() * warp_size + lane();
  const bool there = below(column, 2 * int64_t(s.width));
  auto* sums = reinterpret_cast<float*>(shared_memory());
  float sum = 0.0f;
  if (there) {
#pragma unroll 8
    for (int64_t part = warp(); below(part, s.parts); part += column_warps)
      sum += load(s.partials + part * 2 * s.width + column);
  }
  store_shared(sums + thread(), sum);
  sync_block();
  if (warp() != 0 || !there) return;
  for (int other = 1; below(other, column_warps); ++other)
    sum += load_shared(sums + other * warp_size + lane());
  const bool of_weight = column < s.width;
  const Matrix& out = of_weight ? s.dweight : s.dbias;
  if (out.there()) put<Any, 1>(out, of_weight ? column : column - s.width, {{sum}});
}

// --- choice --------------------------------------------------------------------------------------

void launch_columns(const NormBackward& p, const float* partials, int64_t parts, Launch shape) {
  const Columns columns{partials, parts, int(p.width()), matrix(p.dweight), matrix(p.dbias)};
  shape.cluster = 1;
  shape.block = column_warps * warp_size;
  shape.grid = (2 * p.width() + warp_size - 1) / warp_size;
  shape.shared_bytes = shape.block * int(sizeof(float));
  launch("norm_backward_columns", norm_backward_columns, shape, columns);
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// True where the rows fit the registers of a block or of a cluster.
template <class T, class Z>
bool launch_rows(const NormBackward& p, Backward b, Launch shape) {
  constexpr int N = pack_size<T>, K = 16 / N;
  const int64_t chunks = b.width / N;
  while (chunks > int64_t(shape.cluster) * max_threads * K) shape.cluster *= 2;
  if (shape.cluster > (capability(shape.device) >= 90 ? max_cluster : 1)) return false;
  b.run = int((chunks + shape.cluster - 1) / shape.cluster);
  b.team = team_shape(b.run, K, 1).team;
  const int processors = multiprocessors(shape.device);
  int teams = 1;
  // More rows at a time in a block, while there are rows for all blocks and threads for the rows.
  while (b.team * teams < warp_size ||
         (b.team * teams * 2 <= max_threads && b.rows > int64_t(processors) * teams))
    teams *= 2;
  shape.block = b.team * teams;
  shape.shared_bytes =
      reduction_bytes + int(larger(b.run, int64_t(teams) * b.run)) * N * int(sizeof(float));
  const bool fused = p.dz || p.dresidual || p.seed;
  const auto kernel =
      fused ? norm_backward_rows<T, Z, N, K, true> : norm_backward_rows<T, Z, N, K, false>;
  const int64_t resident =
      larger(1, int64_t(processors) * resident_blocks(kernel, shape) / shape.cluster);
  const int64_t parts = smaller(resident, (b.rows + teams - 1) / teams);
  shape.grid = parts * shape.cluster;
  if (!p.dweight && !p.dbias) {
    launch("norm_backward_rows", kernel, shape, b);
    return true;
  }
  const Workspace workspace(parts * 2 * b.width * int64_t(sizeof(float)), shape.stream,
                            shape.device);
  b.partials = workspace.as<float>();
  launch("norm_backward_rows", kernel, shape, b);
  launch_columns(p, b.partials, parts, shape);
  return true;
}

template <int N>
void launch_strips(const NormBackward& p, Backward b, Launch shape) {
  const int64_t chunks = b.width / N, processors = multiprocessors(shape.device);
  // Few rows are cut in slices, so that all multiprocessors have some.
  const int64_t most = (chunks + 4 * max_threads - 1) / (4 * max_threads);
  b.slices = int(smaller(most, larger(1, 4 * processors / b.rows)));
  b.run = int((chunks + b.slices - 1) / b.slices);
  const TeamShape teams = team_shape(smaller(b.run, 4 * max_threads), 4, 128);
  b.team = teams.team;
  const int block = int(smaller(strip_threads, round_up(chunks, warp_size)));
  const int64_t strips = (chunks + block - 1) / block;
  const int64_t wanted =
      smaller(b.rows, larger(1, processors * 6 * strip_threads / block / strips));
  b.share = (b.rows + wanted - 1) / wanted;
  const int64_t parts = (b.rows + b.share - 1) / b.share;

  const bool columns = p.dweight || p.dbias;
  const int64_t partials = columns ? parts * 2 * b.width : 0;
  const Workspace workspace((partials + b.rows * b.slices * 2) * int64_t(sizeof(float)),
                            shape.stream, shape.device);
  b.partials = columns ? workspace.as<float>() : nullptr;
  b.sums = workspace.as<float>() + partials;

  shape.block = teams.team * teams.teams;
  shape.grid = (b.rows * b.slices + teams.teams - 1) / teams.teams;
  shape.shared_bytes = reduction_bytes;
  launch("norm_backward_sums", norm_backward_sums<N>, shape, b);
  shape.block = block;
  shape.grid = strips * parts;
  shape.shared_bytes = 0;
  launch("norm_backward_strips", norm_backward_strips<N>, shape, b);
  if (columns) launch_columns(p, b.partials, parts, shape);
}

template <class T>
void launch_backward(const NormBackward& p, const Backward& b, const Launch& shape) {
  constexpr int N = pack_size<T>;
  const DType dtype = p.dx.dtype;
  if (p.width() % N != 0 || !takes_chunks(p.dout, 2, N) || !takes_chunks(p.dz, 2, N) ||
      !takes_chunks(p.z, 2, N) || !takes_chunks(p.weight, 1, N) || !takes_chunks(p.dx, 2, N) ||
      !takes_chunks(p.dresidual, 2, N))
    return launch_strips<1>(p, b, shape);
  const bool usual = (!p.dout || p.dout.dtype == dtype) && (!p.dz || p.dz.dtype == p.z.dtype);
  if (usual && p.z.dtype == dtype && launch_rows<T, T>(p, b, shape)) return;
  if (!std::is_same_v<T, float> && usual && p.z.dtype == DType::f32 &&
      launch_rows<T, float>(p, b, shape))
    return;
  launch_strips<N>(p, b, shape);
}

}  // namespace

void run(const NormBackward& p, Stream stream) {
  check_dtypes({&p.dz, &p.z, &p.weight, &p.dresidual, &p.dweight, &p.dbias});
  check_count(p.width(), "columns");
  Backward b = {};
  b.dout = matrix(p.dout);
  b.dz = matrix(p.dz);
  b.z = matrix(p.z);
  b.weight = matrix(p.weight);
  b.dx = matrix(p.dx);
  b.dresidual = matrix(p.dresidual);
  b.mean = static_cast<const float*>(p.mean.data);
  b.rstd = static_cast<const float*>(p.rstd.data);
  b.dropout = dropout(p.seed, p.options.dropout_p);
  b.rows = p.rows();
  b.width = int(p.width());
  b.weight_offset = float(p.options.weight_offset);
  b.centre = p.options.centre;
  Launch shape;
  shape.stream = stream;
  shape.device = p.dx.device;
  visit(p.dx.dtype, [&](auto type) { launch_backward<decltype(type)>(p, b, shape); });
}

}  // namespace fusedattn::cuda
