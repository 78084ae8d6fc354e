// The forward of attention: out = softmax(scale · q kᵀ) v and lse = log Σ exp(scale · q kᵀ).
//
// A block has a tile of queries of one head, a warp 16 or 32 of them, and walks over the tiles of
// keys. For each query it keeps the highest score m so far, l = Σ exp(s − m) and o = Σ exp(s − m) v
// over the keys so far; where m grows, l and o are scaled by exp(m_old − m_new) (Milakov and
// Gimelshein 2018; Dao et al. 2022). m and l are split over the four lanes that share a row: l is
// summed at the end, m with two shuffles in each tile.
//
//   shared memory    the queries, later out; a ring of slots, in which tiles of keys and of values
//                    take turns: K₀ V₀ K₁ V₁ …
//   registers        o and the scores in fp32, p in the element type as the next product's operand,
//                    queries as far as they fit
//
// Where there are few queries the keys are split between blocks, each of which writes its out and
// lse to a workspace; attention_combine.cu makes one of them (Dao et al. 2023, Flash-Decoding).
//
// While a warp computes on one slot, copies to the other slots are under way. One barrier per slot
// says both that its tile has landed and that the slot before it is free again.
//
// The `ruled` variant takes every option: its scores and their maxima are in natural units, see
// attention_scores.cuh.
#pragma once

#include <cmath>

#include "attention_common.cuh"
#include "attention_config.h"
#include "attention_launch.h"
#include "attention_scores.cuh"

namespace fusedattn::cuda {

struct Forward : AttentionForward {
  Rules rules;       // its factor is |scale| · log₂e, above 0; not looked at where `ruled`
  float sign;        // of scale: 1, 0 or -1 (NaN where it is); 1 where scores bend; likewise
  uint32_t tiles;    // blocks of a head: tiles of queries, times the parts of the keys
  uint32_t section;  // heads that are worked on together
  Parts parts;
};

// --- the ring ------------------------------------------------------------------------------------

// Tiles of keys (2 t) and of values (2 t + 1) of one head, in the order in which they are used.
template <class Tile, int slots, int threads>
class Ring {
 public:
  template <bool windowed>
  FUSEDATTN_DEVICE Ring(char* data, const Forward& p, int64_t b, int64_t head,
                        const Sequence<int, windowed>& sequence, int end)
      : data_(data),
        k_(rows_of(p.k, b, head, sequence.first_k)),
        v_(rows_of(p.v, b, head, sequence.first_k)),
        width_k_(width_of(p.k)),
        width_v_(width_of(p.v)),
        keys_(sequence.seq_k),
        end_(end) {}

  // Fills all slots but one, from tile t on. Copies that were begun before land with the first.
  FUSEDATTN_DEVICE void start(int t) {
#pragma unroll
    for (int item = 0; item < slots - 1; ++item) fetch(t + item / 2, item % 2, item);
  }

  // The tile of keys, or of values, with number t, which has landed; begins to copy another one.
  template <bool values>
  FUSEDATTN_DEVICE Tile next(int t) {
    wait_copies<slots - 2>();
    sync_block();
    const int before = slot_ == 0 ? slots - 1 : slot_ - 1;
    constexpr int ahead = values + slots - 1;
    fetch(t + ahead / 2, ahead % 2, before);
    const Tile tile{data_ + slot_ * Tile::bytes};
    slot_ = slot_ == slots - 1 ? 0 : slot_ + 1;
    return tile;
  }

 private:
  // A group of copies for each tile, an empty one past the last.
  FUSEDATTN_DEVICE void fetch(int t, bool values, int slot) {
    if (t < end_)
      copy_tile<threads>(Tile{data_ + slot * Tile::bytes}, values ? v_ : k_, t * Tile::rows, keys_,
                         values ? width_v_ : width_k_);
    commit_copies();
  }

  char* data_;
  Rows k_, v_;
  int width_k_, width_v_, keys_, end_;  // end_: of the tiles
  int slot_ = 0;
};

// --- softmax -------------------------------------------------------------------------------------

// NaN only where both are.
FUSEDATTN_DEVICE float larger(float a, float b) { return ::fmaxf(a, b); }

// Of the queries of a lane, two in each of m fragments. `natural`: so are scores, else they become
// log2 units times `scale`.
template <int m, bool natural>
struct Softmax {
  float highest[m][2], sum[m][2];  // sum: over this lane's keys

  FUSEDATTN_DEVICE Softmax() {
#pragma unroll
    for (int i = 0; i < m; ++i)
      highest[i][0] = highest[i][1] = -INFINITY, sum[i][0] = sum[i][1] = 0.0f;
  }

  // Of a score, in powers of 2 unless `natural`. A row that has seen nothing keeps exp(−∞ − 0) = 0
  // instead of exp(−∞ + ∞).
  FUSEDATTN_DEVICE float shift(int i, int half, float scale) const {
    const float high = highest[i][half];
    return high == -INFINITY ? 0.0f : natural ? high : high * scale;
  }

  FUSEDATTN_DEVICE static float power(float score, float scale, float shift) {
    return exp2(natural ? (score - shift) * log2_e : fma(score, scale, -shift));
  }

  // s becomes exp(s − highest); what was summed before comes to the new highest score.
  template <int n, int w>
  FUSEDATTN_DEVICE void update(Pack<float, 4> (&s)[m][n], Pack<float, 4> (&out)[m][w],
                               float scale) {
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float before = highest[i][half];
        float found = before;
#pragma unroll
        for (int j = 0; j < n; ++j)
          found = larger(found, larger(s[i][j][2 * half], s[i][j][2 * half + 1]));
        found = larger(found, shuffle_xor(found, 1));
        highest[i][half] = larger(found, shuffle_xor(found, 2));
        const float base = shift(i, half, scale);
        const float factor = power(before, scale, base);
        float total = sum[i][half] * factor;
#pragma unroll
        for (int j = 0; j < n; ++j)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[i][j][e] = power(s[i][j][e], scale, base);
            total += s[i][j][e];
          }
        sum[i][half] = total;
#pragma unroll
        for (int j = 0; j < w; ++j)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) out[i][j][e] *= factor;
      }
  }

  // out becomes out / sum, 0 of a row that has seen nothing. If `natural`, out is also multiplied
  // by `factor`, and the sum is with a sink if there is an address of one.
  template <int w>
  FUSEDATTN_DEVICE void finish(Pack<float, 4> (&out)[m][w], float factor, const float* sink) {
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[i][half] += shuffle_xor(sum[i][half], 1);
        sum[i][half] += shuffle_xor(sum[i][half], 2);
        float share = sum[i][half] == 0.0f ? 0.0f : 1.0f / sum[i][half];
        if constexpr (natural) {
          if (sink != nullptr && sum[i][half] != 0.0f) {
            const float others = add_sink(highest[i][half], sum[i][half], load(sink));
            share = others / sum[i][half];
          }
          share *= factor;
        }
#pragma unroll
        for (int j = 0; j < w; ++j) out[i][j][2 * half] *= share, out[i][j][2 * half + 1] *= share;
      }
  }

  FUSEDATTN_DEVICE float lse(int i, int half, float scale) const {
    if (natural) return fma(log2(sum[i][half]), ln_2, shift(i, half, scale));
    return (shift(i, half, scale) + log2(sum[i][half])) * ln_2;
  }
};

// −∞ for the keys that a query does not see. first: the warp's first query; start: the first key.
template <int m, int n, bool windowed>
FUSEDATTN_DEVICE void hide(Pack<float, 4> (&s)[m][n], const Sequence<int, windowed>& sequence,
                           int first, int start) {
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first + 16 * i + row_of(2 * half), key = start + column_of(0);
      const int begin = sequence.begin(query) - key, end = sequence.end(query) - key;
#pragma unroll
      for (int j = 0; j < n; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * j + e >= end || (windowed && 8 * j + e < begin))
            s[i][j][2 * half + e] = -INFINITY;
    }
}

// The scores of a warp from their raw products, and then dropout of its weights: in the variant
// with every option.
template <class T, int m, int n>
FUSEDATTN_DEVICE void scores_of(Pack<float, 4> (&s)[m][n], const Forward& p,
                                const Sequence<int>& sequence, int b, int h, int first, int start) {
  const HeadScores<T> scores(p, p.rules, sequence, b, h);
  Pack<float, 4> slope;
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int j = 0; j < n; ++j)
      scores.template apply<false>(s[i][j], first + 16 * i + row_of(0),
                                   start + 8 * j + column_of(0), slope);
}

template <class T, int m, int n>
FUSEDATTN_DEVICE void drop(Pack<float, 4> (&s)[m][n], const Forward& p,
                           const Sequence<int>& sequence, int b, int h, int first, int start) {
  if (!p.rules.drops) return;
  const HeadScores<T> scores(p, p.rules, sequence, b, h);
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const uint32_t kept =
          scores.template kept<false>(first + 16 * i + row_of(0), start + 8 * j + column_of(0));
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (!(kept >> e & 1)) s[i][j][e] = 0.0f;
    }
}

// --- kernel --------------------------------------------------------------------------------------

// The queries of a warp: the first `held` columns in registers, the others in shared memory.
template <class T, class Tile, int m, int held>
struct Queries {
  OperandA<Tile, Sum::along> stored;
  HeldA<T, m, held == 0 ? 1 : held / 16> first;

  FUSEDATTN_DEVICE Queries(const Tile& tile, int row) : stored(tile, row) {}
  FUSEDATTN_DEVICE void load() { first.load(stored); }
  FUSEDATTN_DEVICE Pack<uint32_t, 4> fragment(int i, int s) const {
    return 16 * s < held ? first.fragment(i, s) : stored.fragment(i, s);
  }
};

// out and lse of a part of the keys, to the workspace.
template <int tile, int m, bool natural, int w>
FUSEDATTN_DEVICE void write_part(const Forward& p, int row, const Softmax<m, natural>& softmax,
                                 const Pack<float, 4> (&out)[m][w]) {
  // Worked out once more, to stay in no registers meanwhile.
  const Work work =
      work_of(uint32_t(anew(int(block()))), p.tiles, uint32_t(p.batch() * p.heads()), p.section);
  const int part = work.tile % p.parts.count, width = int(p.head_dim_v());
  const int64_t first = (part * p.batch() * p.heads() + work.head) * p.longest_q();
  row += work.tile / p.parts.count * tile;
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + 16 * i + row_of(2 * half);
      if (!below(query, p.longest_q())) continue;
      if (column_of(0) == 0)
        store(p.parts.lse + first + query, softmax.lse(i, half, p.rules.factor));
      float* to = p.parts.out + (first + query) * width + column_of(0);
#pragma unroll
      for (int j = 0; j < w; ++j)
        if (8 * j < width)
          store(to + 8 * j, Pack<float, 2>{out[i][j][2 * half], out[i][j][2 * half + 1]});
    }
}

// out and lse, by way of the tile of queries: its rows are the warp's own, and were last read
// before a barrier of the ring.
template <class T, class Tile, int m, bool natural, int w>
FUSEDATTN_DEVICE void write(const Forward& p, int64_t b, int64_t h,
                            const Sequence<int, natural>& sequence, int first, const Tile& tile,
                            int row, const Softmax<m, natural>& softmax,
                            const Pack<float, 4> (&out)[m][w]) {
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first + row + 16 * i + row_of(2 * half);
      if (column_of(0) == 0 && query < sequence.seq_q)
        store(p.lse.at<float>(b, h, sequence.query_row(query)),
              softmax.lse(i, half, p.rules.factor));
    }
  round_to<T>(tile, row, 0, out);
  sync_warp();
  write_rows<16 * m>(tile, row, p.out.at<uint16_t>(b, h, sequence.first_q), p.out.stride[2],
                     first + row, sequence.seq_q, width_of(p.out));
}

template <class T, int head_dim, Variant variant>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(forward_shape(head_dim, variant).threads(),
                                              forward_shape(head_dim, variant).blocks)
    attention_forward(const FUSEDATTN_GRID_CONSTANT Forward p) {
  constexpr ForwardShape shape = forward_shape(head_dim, variant);
  constexpr bool ruled = variant == Variant::ruled;
  constexpr int m = shape.queries / shape.warps / 16, n = shape.keys / 8, w = head_dim / 8;
  using QueryTile = Tile<shape.queries, head_dim>;
  using KeyTile = Tile<shape.keys, head_dim>;
  static_assert(QueryTile::bytes + shape.slots * KeyTile::bytes == shape.shared_bytes);

  const Work work = work_of(uint32_t(block()), p.tiles, uint32_t(p.batch() * p.heads()), p.section);
  const int h = work.head % int(p.heads()), row = warp() * 16 * m;
  const auto [sequence, b, tile] = place_of<ruled>(
      p, work.head / int(p.heads()), int(work.tile / p.parts.count), Side::queries, shape.queries);
  const int first = tile * shape.queries;
  const Tiles tiles = key_tiles(sequence, first, shape.queries, shape.keys);
  const Part part =
      part_of(tiles.begin, tiles.end, int(work.tile % p.parts.count), int(p.parts.count));

  const QueryTile query_tile{shared_memory()};
  Ring<KeyTile, shape.slots, shape.threads()> ring(shared_memory() + QueryTile::bytes, p, b,
                                                   h / int(p.group()), sequence, part.end);
  Queries<T, QueryTile, m, shape.held> queries(query_tile, row);
  Softmax<m, ruled> softmax;
  Pack<float, 4> out[m][w];
  clear(out);
  if (part.begin < part.end) {
    copy_tile<shape.threads()>(query_tile, rows_of(p.q, b, h, sequence.first_q), first,
                               sequence.seq_q, width_of(p.q));
    ring.start(part.begin);
    if constexpr (shape.held > 0) {
      wait_copies<shape.slots - 2>();
      sync_block();
      queries.load();
    }
  }
#pragma unroll 1
  for (int t = part.begin; t < part.end; ++t) {
    Pack<float, 4> s[m][n];
    clear(s);
    multiply<T, head_dim / 16>(s, queries,
                               OperandB<KeyTile, Sum::along>(ring.template next<false>(t)));
    if constexpr (ruled) {
      scores_of<T>(s, p, sequence, b, h, first + row, t * shape.keys);
    } else {
      p.rules.apply(s);
      if (p.sign != 1.0f)
#pragma unroll
        for (int i = 0; i < m * n * 4; ++i) s[i / (4 * n)][i / 4 % n][i % 4] *= p.sign;
    }
    if (tiles.masked(t)) hide(s, sequence, first + row, t * shape.keys);
    softmax.update(s, out, p.rules.factor);
    if constexpr (ruled) drop<T>(s, p, sequence, b, h, first + row, t * shape.keys);
    HeldA<T, m, n / 2> weights;
    weights.round(s);
    multiply<T, n / 2>(out, weights, OperandB<KeyTile, Sum::across>(ring.template next<true>(t)));
  }
  const bool sunk = ruled && present(p.sinks) && p.parts.count == 1;
  softmax.finish(out, p.rules.keep_scale, sunk ? p.sinks.at<float>(0, h) : nullptr);
  if (p.parts.count == 1)
    write<T>(p, b, h, sequence, first, query_tile, row, softmax, out);
  else
    write_part<shape.queries>(p, row, softmax, out);
}

// --- launcher ------------------------------------------------------------------------------------

// The most keys that a tile of so many queries sees.
inline int64_t keys_in_reach(const AttentionForward& p, int64_t queries) {
  if (p.options.window_left < 0) return p.longest_k();
  const Sequence<int64_t> all = p.with_keys(p.longest_k());
  const int64_t wide = all.upper - all.lower + queries - 1;
  return wide < p.longest_k() ? wide : p.longest_k();
}

// One query of each head: those of a group, which see the same keys, become the queries of one.
inline void unite_groups(AttentionForward& p) {
  if (p.longest_q() != 1 || p.options.causal == Causal::top_left) return;
  const int64_t group = p.group(), heads_kv = p.heads_kv();
  for (TensorView* x : {&p.q, &p.out, &p.lse}) {
    x->shape[1] = heads_kv;
    x->shape[2] = group;
    x->stride[2] = x->stride[1];
    x->stride[1] *= group;
  }
  p.options.causal = Causal::none;  // the last query sees all keys
}

template <class T, int head_dim, Variant variant>
void launch_forward(Forward f, Launch launch) {
  constexpr ForwardShape shape = forward_shape(head_dim, variant);
  const int64_t heads = f.batch() * f.heads();
  const int64_t tiles = tiles_of(f, Side::queries, shape.queries);
  const int64_t head_bytes = 2 * f.longest_k() * (f.head_dim() + f.head_dim_v());
  const int64_t parts = f.cu_seqlens_q
                            ? 1
                            : parts_of(tiles * heads, multiprocessors(launch.device) * shape.blocks,
                                       ceil_div(keys_in_reach(f, shape.queries), shape.keys));
  f.section = uint32_t(
      f.group() * section_of(f.batch() * f.heads_kv(), head_bytes, cache_bytes(launch.device)));
  f.tiles = uint32_t(tiles * parts);
  launch.grid = f.tiles * heads;
  launch.block = shape.threads();
  launch.shared_bytes = shape.shared_bytes;
  const auto run = [&] {
    cuda::launch("attention_forward", attention_forward<T, head_dim, variant>, launch, f);
  };
  if (parts == 1) return run();
  const int64_t rows = parts * heads * f.longest_q(), outs = rows * f.head_dim_v();
  const Workspace workspace((outs + rows) * int64_t(sizeof(float)), launch.stream, launch.device);
  f.parts = {workspace.as<float>(), workspace.as<float>() + outs, uint32_t(parts)};
  run();
  launch_attention_combine(f, f.parts, launch);
}

template <class T, int head_dim>
void launch_attention_forward(const AttentionForward& p, Stream stream) {
  const float scale = float(p.options.scale);
  Forward f;
  static_cast<AttentionForward&>(f) = p;
  const bool ruled = needs_rules(p) || p.sinks;
  if (!ruled) unite_groups(f);
  f.rules = Rules(p.options);
  f.sign = f.rules.factor > 0.0f ? 1.0f : scale < 0.0f ? -1.0f : scale;
  // With a scale of 0 the scores become 0, and the factor must only keep −∞ what it is.
  f.rules.factor = f.rules.factor == 0.0f ? 1.0f : std::abs(f.rules.factor);
  Launch launch;
  launch.stream = stream;
  launch.device = p.q.device;
  if (ruled)
    launch_forward<T, head_dim, Variant::ruled>(f, launch);
  else if (variant_for(max_shared_bytes(launch.device)) == Variant::large)
    launch_forward<T, head_dim, Variant::large>(f, launch);
  else
    launch_forward<T, head_dim, Variant::little>(f, launch);
}

}  // namespace fusedattn::cuda
