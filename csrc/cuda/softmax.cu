// Softmax on NVIDIA GPUs; the maths stands in softmax.h.
//
// Each element is read once and written once. A row lies in the registers of a team (a part of a
// warp, a warp, several warps); too wide for that, in the shared memory of a block or of a cluster,
// which then sums as it reads (Milakov and Gimelshein 2018); what does not fit there is read again.
// Keys past the diagonal are not read at all.
#include "kernels.h"
#include "rowwise.cuh"

namespace fusedattn::cuda {
namespace {

constexpr float log2_e = 1.4426950408889634f;

// A (B, H, rows, width) tensor.
struct Grid : Matrix {
  int64_t strides[4] = {0, 0, 0, 0};
};

Grid grid(const TensorView& view) {
  Grid result;
  result.data = view.data;
  result.dtype = view.dtype;
  for (int i = 0; i < 4; ++i) result.strides[i] = view.stride[i];
  return result;
}

// What the rows of both directions have in common.
struct Rows {
  int64_t count, heads, queries;
  int64_t diagonal;  // query i sees keys [0, i + diagonal]
  int width;
  bool causal;
  float scale;
  int team;       // threads of a row in registers
  int run, kept;  // of a wide row: the chunks of a block, and of these in shared memory
};

struct Forward : Rows {
  Grid x, mask, bias, out;
};

struct Backward : Rows {
  Grid dout, out, dx, ds;
};

// Where a row lies.
struct Row {
  int64_t b, i;
  int h, end;  // end: of the keys that it may see

  FUSEDATTN_DEVICE Row(const Rows& rows, int64_t number) {
    const int64_t matrix = number / rows.queries;
    b = matrix / rows.heads;
    h = int(matrix - b * rows.heads);
    i = number - matrix * rows.queries;
    const int64_t seen = i + rows.diagonal + 1;
    end = !rows.causal || seen > rows.width ? rows.width : seen > 0 ? int(seen) : 0;
    if (!below(number, rows.count)) end = 0;
  }

  // The index of chunk c of N elements; only single elements lie apart.
  template <int N>
  FUSEDATTN_DEVICE int64_t at(const Grid& g, int c) const {
    const int64_t row = b * g.strides[0] + h * g.strides[1] + i * g.strides[2];
    return row + (N == 1 ? c * g.strides[3] : c * int64_t(N));
  }
};

struct Larger {
  FUSEDATTN_DEVICE Pack<float, 1> operator()(const Pack<float, 1>& a,
                                             const Pack<float, 1>& b) const {
    return a[0] > b[0] ? a : b;
  }
};

// --- scores --------------------------------------------------------------------------------------

// N elements of type T of mask or bias, at chunk c; one where they are broadcast along the row.
template <class T, int N>
FUSEDATTN_DEVICE Pack<T, N> fetch_along(const Grid& g, const Row& row, int c) {
  if (N > 1 && g.strides[3] == 0)
    return filled<T, N>(load(static_cast<const T*>(g.data) + row.at<N>(g, 0)));
  return load<N>(static_cast<const T*>(g.data) + row.at<N>(g, c));
}

// s = scale · x + bias, −∞ where masked, at K chunks of a row, which all are below row.end.
// `extras`: there may be a bias and a mask.
template <class T, bool extras, int N, int K>
FUSEDATTN_DEVICE void scores(Pack<float, N> (&s)[K], const Forward& f, const Row& row,
                             const Chunks& chunks) {
  Pack<Held<T>, N> x[K];
  chunks.each<K>([&](int k, int c) { x[k] = fetch_once<T, N>(f.x, row.at<N>(f.x, c)); });
#pragma unroll
  for (int k = 0; k < K; ++k) s[k] = filled<float, N>(-INFINITY);
  chunks.each<K>([&](int k, int) {
#pragma unroll
    for (int i = 0; i < N; ++i) s[k][i] = to_float(x[k][i]) * f.scale;
  });
  if constexpr (extras) {
    if (f.bias.there())
      with_type(f.bias.dtype, [&](auto type) {
        using B = decltype(type);
        Pack<B, N> bias[K];
        chunks.each<K>([&](int k, int c) { bias[k] = fetch_along<B, N>(f.bias, row, c); });
        chunks.each<K>([&](int k, int) { s[k] = Add()(s[k], widen(bias[k])); });
      });
    if (f.mask.there())
      chunks.each<K>([&](int k, int c) {
        const auto visible = fetch_along<uint8_t, N>(f.mask, row, c);
#pragma unroll
        for (int i = 0; i < N; ++i)
          if (visible[i] == 0) s[k][i] = -INFINITY;
      });
  }
  if (f.causal && N > 1)
    chunks.each<K>([&](int k, int c) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (!below(c * N + i, row.end)) s[k][i] = -INFINITY;
    });
}

// exp(s − largest). The difference first: what a multiply-add loses by rounding largest · log₂e is
// beyond all exponents for the largest scores, and between parts of a row not the same.
template <int N>
FUSEDATTN_DEVICE Pack<float, N> powers(const Pack<float, N>& s, float largest) {
  const float origin = largest == -INFINITY ? 0.0f : largest;
  Pack<float, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result[i] = exp2((s[i] - origin) * log2_e);
  return result;
}

// Of a row with nothing to see the sum is 0, and so is the result.
FUSEDATTN_DEVICE float share_of(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

template <int N>
FUSEDATTN_DEVICE Pack<float, N> times(Pack<float, N> x, float factor) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] *= factor;
  return x;
}

template <int N>
FUSEDATTN_DEVICE float sum_of(const Pack<float, N>& x) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += x[i];
  return sum;
}

template <int N>
FUSEDATTN_DEVICE float largest_of(const Pack<float, N>& x) {
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < N; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// --- forward -------------------------------------------------------------------------------------

// A row to a team.
template <class T, int N, int K, bool extras>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(max_threads, extras ? 1 : 2)
    softmax_forward_rows(const FUSEDATTN_GRID_CONSTANT Forward f) {
  Team team(f.team);
  const int64_t number = block() * (block_size() / team.size) + team.index;
  const Row row(f, number);
  Pack<float, N> s[K];
  scores<T, extras>(s, f, row, Chunks{team.rank, team.size, (row.end + N - 1) / N});
  Pack<float, 1> largest = {{-INFINITY}}, sum = {};
#pragma unroll
  for (int k = 0; k < K; ++k) largest = Larger()(largest, {{largest_of(s[k])}});
  largest = team.reduce(largest, Larger());
#pragma unroll
  for (int k = 0; k < K; ++k) {
    s[k] = powers(s[k], largest[0]);
    sum[0] += sum_of(s[k]);
  }
  const float share = share_of(team.reduce(sum, Add())[0]);
  if (!below(number, f.count)) return;
  Chunks{team.rank, team.size, f.width / N}.template each<K>(
      [&](int k, int c) { put<T>(f.out, row.at<N>(f.out, c), times(s[k], share)); });
}

// The largest score of some elements, and Σ exp(s − largest).
using Online = Pack<float, 2>;

struct MergeOnline {
  FUSEDATTN_DEVICE Online operator()(const Online& a, const Online& b) const {
    const float largest = a[0] > b[0] ? a[0] : b[0];
    return {{largest, a[1] * scale(a[0], largest) + b[1] * scale(b[0], largest)}};
  }

  // Where they are equal, also where both are −∞, 1.
  FUSEDATTN_DEVICE static float scale(float from, float to) {
    return from == to ? 1.0f : exp2((from - to) * log2_e);
  }
};

// A row to a block, or to a cluster.
template <int N, bool extras>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(max_threads, 2)
    softmax_forward_wide(const FUSEDATTN_GRID_CONSTANT Forward f) {
  constexpr int K = extras ? 1 : N == 8 ? 2 : 4;  // chunks under way at a time
  const Row row(f, block() / cluster_size());
  const int begin = cluster_rank() * f.run, all = f.width / N, seen = (row.end + N - 1) / N;
  const int end = begin + f.run < all ? begin + f.run : all;
  const int last = seen < end ? seen : end;
  auto* kept = reinterpret_cast<Pack<float, N>*>(shared_memory() + reduction_bytes);
  sync_cluster();  // all blocks must run before one writes to another

  Online online = {{-INFINITY, 0.0f}};
  for (int first = begin + thread(); first < last; first += K * block_size()) {
    const Chunks chunks{first, block_size(), last};
    Pack<float, N> s[K];
    scores<Any, extras>(s, f, row, chunks);
    chunks.each<K>([&](int k, int c) {
      if (below(c - begin, f.kept)) store_shared(kept + (c - begin), s[k]);
      const float largest = largest_of(s[k]);
      online = MergeOnline()(online, {{largest, sum_of(powers(s[k], largest))}});
    });
  }
  online = Team(block_size()).reduce(online, MergeOnline());
  const float share = share_of(online[1]);
  for (int c = begin + thread(); below(c, end); c += block_size()) {
    Pack<float, N> s[1] = {filled<float, N>(-INFINITY)};
    if (!below(c, last))
      ;
    else if (below(c - begin, f.kept))
      s[0] = load_shared(kept + (c - begin));
    else
      scores<Any, extras>(s, f, row, Chunks{c, 1, last});
    put<Any>(f.out, row.at<N>(f.out, c), times(powers(s[0], online[0]), share));
  }
}

// --- backward ------------------------------------------------------------------------------------

// ds = out ∘ (dout − Σ dout · out), where a row sees something, and dx = scale · ds.
template <class T, int N>
FUSEDATTN_DEVICE void write(const Backward& b, const Row& row, int c, const Pack<float, N>& out,
                            const Pack<float, N>& dout, float sum) {
  Pack<float, N> ds;
#pragma unroll
  for (int i = 0; i < N; ++i) ds[i] = out[i] * (dout[i] - sum);
  if (b.ds.there()) put<float>(b.ds, row.at<N>(b.ds, c), ds);
  if (b.dx.there()) put<T>(b.dx, row.at<N>(b.dx, c), times(ds, b.scale));
}

template <int N>
FUSEDATTN_DEVICE float dot(const Pack<float, N>& a, const Pack<float, N>& b) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) sum = fma(a[i], b[i], sum);
  return sum;
}

template <class T, int N, int K>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(max_threads, 2)
    softmax_backward_rows(const FUSEDATTN_GRID_CONSTANT Backward b) {
  Team team(b.team);
  const int64_t number = block() * (block_size() / team.size) + team.index;
  const Row row(b, number);
  const Chunks seen{team.rank, team.size, (row.end + N - 1) / N};
  Pack<Held<T>, N> out[K], dout[K];
#pragma unroll
  for (int k = 0; k < K; ++k) out[k] = dout[k] = {};
  seen.each<K>([&](int k, int c) {
    out[k] = fetch_once<T, N>(b.out, row.at<N>(b.out, c));
    dout[k] = fetch_once<T, N>(b.dout, row.at<N>(b.dout, c));
  });
  Pack<float, 1> sum = {};
#pragma unroll
  for (int k = 0; k < K; ++k) sum[0] += dot(widen(out[k]), widen(dout[k]));
  sum = team.reduce(sum, Add());
  if (!below(number, b.count)) return;
  Chunks{team.rank, team.size, b.width / N}.template each<K>(
      [&](int k, int c) { write<T>(b, row, c, widen(out[k]), widen(dout[k]), sum[0]); });
}

template <int N>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(max_threads, 2)
    softmax_backward_wide(const FUSEDATTN_GRID_CONSTANT Backward b) {
  struct Both {
    Pack<float, N> out = {}, dout = {};
  };
  const Row row(b, block() / cluster_size());
  const int begin = cluster_rank() * b.run, all = b.width / N, seen = (row.end + N - 1) / N;
  const int end = begin + b.run < all ? begin + b.run : all;
  const int last = seen < end ? seen : end;
  // The kept part of out, then that of dout.
  auto* kept = reinterpret_cast<Pack<float, N>*>(shared_memory() + reduction_bytes) - begin;
  sync_cluster();  // all blocks must run before one writes to another

  const auto read = [&](int c) {
    return Both{fetch<Any, N>(b.out, row.at<N>(b.out, c)),
                fetch<Any, N>(b.dout, row.at<N>(b.dout, c))};
  };
  Pack<float, 1> sum = {};
#pragma unroll 2
  for (int c = begin + thread(); below(c, last); c += block_size()) {
    const Both both = read(c);
    sum[0] += dot(both.out, both.dout);
    if (below(c - begin, b.kept)) {
      store_shared(kept + c, both.out);
      store_shared(kept + b.kept + c, both.dout);
    }
  }
  sum = Team(block_size()).reduce(sum, Add());
  for (int c = begin + thread(); below(c, end); c += block_size()) {
    Both both;
    if (below(c, last))
      both = below(c - begin, b.kept) ? Both{load_shared(kept + c), load_shared(kept + b.kept + c)}
                                      : read(c);
    write<Any>(b, row, c, both.out, both.dout, sum[0]);
  }
}

// --- choice --------------------------------------------------------------------------------------

template <class Params>
void describe(Rows& rows, Launch& shape, const Params& p, const TensorView& like, Stream stream) {
  check_count(like.shape[1], "heads");
  check_count(p.width(), "columns");
  rows.count = p.rows();
  rows.heads = like.shape[1];
  rows.queries = like.shape[2];
  rows.width = int(p.width());
  rows.causal = p.options.causal != SoftmaxCausal::none;
  rows.diagonal = p.options.causal == SoftmaxCausal::bottom_right ? p.width() - like.shape[2] : 0;
  rows.scale = float(p.options.scale);
  shape.stream = stream;
  shape.device = like.device;
}

// Chunks of N elements can be read from the tensor, or one element stands for all of a row.
bool in_chunks(const TensorView& view, int n) {
  return view.stride[3] == 0 || takes_chunks(view, 4, n);
}

template <class Arguments>
void launch_rows(void (*kernel)(Arguments), const char* name, Arguments a, Launch shape,
                 int64_t chunks, int each) {
  const TeamShape teams = team_shape(chunks, each, 128);
  a.team = teams.team;
  shape.block = teams.team * teams.teams;
  shape.grid = (a.count + teams.teams - 1) / teams.teams;
  shape.shared_bytes = reduction_bytes;
  launch(name, kernel, shape, a);
}

template <class Arguments>
void launch_wide(void (*kernel)(Arguments), const char* name, Arguments a, Launch shape,
                 int64_t chunks, int chunk_bytes) {
  const WideShape wide = wide_shape(chunks, chunk_bytes, shape.device);
  a.run = wide.run;
  a.kept = wide.kept;
  shape.block = max_threads;
  shape.cluster = wide.cluster;
  shape.grid = a.count * wide.cluster;
  shape.shared_bytes = wide.shared_bytes;
  launch(name, kernel, shape, a);
}

template <class T, int N>
void launch_forward(const Forward& f, const Launch& shape) {
  constexpr int most = N == 1 ? 8 : 16 / N;        // chunks of a thread
  constexpr bool always = std::is_same_v<T, Any>;  // one kernel for both: fewer to compile
  const char* name = "softmax_forward";
  const int64_t chunks = f.width / N;
  const bool extras = f.bias.data != nullptr || f.mask.data != nullptr;
  if (chunks <= warp_size)
    launch_rows(
        extras ? softmax_forward_rows<T, N, 1, true> : softmax_forward_rows<T, N, 1, always>, name,
        f, shape, chunks, 1);
  else if (chunks <= max_threads * most)
    launch_rows(
        extras ? softmax_forward_rows<T, N, most, true> : softmax_forward_rows<T, N, most, always>,
        name, f, shape, chunks, most);
  else
    launch_wide(extras ? softmax_forward_wide<N, true> : softmax_forward_wide<N, false>, name, f,
                shape, chunks, N * int(sizeof(float)));
}

template <class T, int N>
void launch_backward(const Backward& b, const Launch& shape) {
  constexpr int most = N == 1 ? 8 : 16 / N;
  const char* name = "softmax_backward";
  const int64_t chunks = b.width / N;
  if (chunks <= warp_size)
    launch_rows(softmax_backward_rows<T, N, 1>, name, b, shape, chunks, 1);
  else if (chunks <= max_threads * most)
    launch_rows(softmax_backward_rows<T, N, most>, name, b, shape, chunks, most);
  else
    launch_wide(softmax_backward_wide<N>, name, b, shape, chunks, 2 * N * int(sizeof(float)));
}

}  // namespace

void run(const SoftmaxForward& p, Stream stream) {
  Forward f = {};
  Launch shape;
  describe(f, shape, p, p.x, stream);
  f.x = grid(p.x);
  f.mask = grid(p.mask);
  f.bias = grid(p.bias);
  f.out = grid(p.out);
  visit(p.dtype(), [&](auto type) {
    using T = decltype(type);
    constexpr int N = pack_size<T>;
    if (p.width() % N == 0 && takes_chunks(p.x, 4, N) && takes_chunks(p.out, 4, N) &&
        in_chunks(p.mask, N) && in_chunks(p.bias, N))
      launch_forward<T, N>(f, shape);
    else
      launch_forward<Any, 1>(f, shape);
  });
}

void run(const SoftmaxBackward& p, Stream stream) {
  Backward b = {};
  Launch shape;
  describe(b, shape, p, p.out, stream);
  b.dout = grid(p.dout);
  b.out = grid(p.out);
  b.dx = grid(p.dx);
  b.ds = grid(p.ds);
  visit(p.dtype(), [&](auto type) {
    using T = decltype(type);
    constexpr int N = pack_size<T>;
    if (p.width() % N == 0 && p.dout.dtype == p.dtype() && takes_chunks(p.dout, 4, N) &&
        takes_chunks(p.out, 4, N) && takes_chunks(p.dx, 4, N) && takes_chunks(p.ds, 4, N))
      launch_backward<T, N>(b, shape);
    else
      launch_backward<Any, 1>(b, shape);
  });
}

}  // namespace fusedattn::cuda
