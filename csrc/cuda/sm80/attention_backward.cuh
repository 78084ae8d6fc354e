// The backward of attention: dK and dV, and dQ by atomic additions. With the scores of a query and
// a key s, p = exp(scale · s − lse), dp = dout · v and Δ = rowsum(dout ∘ out) − dlse:
//
//   ds = p ∘ (dp − Δ)     dv = pᵀ dout     dk = scale · dsᵀ q     dq = scale · ds k
//
// (Dao et al. 2022, appendix B.2; the gradient of lse only shifts Δ.) Dropout leaves the same of p
// in dv and of dp as it left of p in the forward. In fp16 ds is kept times a power of two, e:
// attention_backward_scale.cuh. Four kernels and, for e, one before:
//
//   attention_backward_rows      e · Δ and lse in powers of 2, for each query
//   attention_backward_keys      a tile of keys of one key head; over the queries of all heads of
//                                its group. dK and dV stay in registers; dQ is added to a workspace
//   attention_backward_round     dQ from the workspace: scaled and rounded
//   attention_backward_queries   dQ where it must be the same each time: attention_backward_dq.cuh
//
// and for the slopes of ALiBi attention_slopes.cu, from sums of attention_backward_keys. That adds
// up the gradient of a bias as well, attention_backward_bias_sums.cuh, which attention_bias.cu
// rounds; where the order of such a sum matters, attention_backward_bias.cuh.
//
// Scores are computed transposed, keys × queries: a warp's part of pᵀ and of dsᵀ comes out in the
// layout that the next product takes it in, and stays in registers. Only ds · k sums over the keys
// of all warps and takes dsᵀ from shared memory. For wide heads dK and dV of 16 keys do not fit in
// the registers of a warp: then several warps share keys, each has its columns of dK and dV and its
// queries of the scores, and pᵀ goes through shared memory too.
#pragma once

#include "attention_backward_bias_sums.cuh"
#include "attention_backward_scale.cuh"
#include "attention_backward_scores.cuh"
#include "attention_backward_sums.cuh"
#include "attention_common.cuh"
#include "attention_scores.cuh"

namespace fusedattn::cuda {

// --- what the kernels share ----------------------------------------------------------------------

// The terms of a head's queries are padded to whole tiles of any shape.
constexpr int row_padding = 128;

struct Backward : AttentionBackward {
  // Of each query, (B, Hq, rows); one that sees nothing or does not exist has ∞ and 0.
  float* shift;   // lse · log₂e, or lse where `ruled`
  float* delta;   // e · Δ
  float* dq_sum;  // (B, Hq, dq_tiles, tile): fragments of dq · e / scale, or absent
  int64_t rows;   // Sq rounded up to row_padding; of packed sequences dq_tiles tiles
  Rules rules;
  uint32_t dq_tiles;
  uint32_t heads_together;  // heads of queries of a head of keys
  uint32_t tiles, section;  // of the kernel's blocks: tiles of a head, heads worked on together
  uint32_t tile_rows;       // of queries
  float* norms;             // (B, Hkv, norms_of_head), where ds is scaled
  float* ds_scales;         // (B, Hq): e
  float* slope_sums;        // (B, Hq, tiles of keys, warps), or absent: attention_slopes.cu
  BiasSums bias_sums;       // of attention_backward_keys

  // Where the tiles of queries of sequence b begin among those of its head.
  template <bool ruled>
  FUSEDATTN_DEVICE int first_tile(const Sequence<int, ruled>& sequence, int b) const {
    return ruled && present(cu_seqlens_q) ? sequence.first_q / int(tile_rows) + b : 0;
  }
};

// One of B · H heads, taken apart. Unsigned, so that 64-bit offsets need no sign.
struct Head {
  uint32_t b, h;

  FUSEDATTN_DEVICE Head(uint32_t of_all, int64_t heads)
      : b(of_all / uint32_t(heads)), h(of_all - b * uint32_t(heads)) {}
};

// 16-bit fragments to a tile, from chunk `chunk` on.
template <class T, int m, int steps, class Tile>
FUSEDATTN_DEVICE void put(const Tile& tile, int row, int chunk, const HeldA<T, m, steps>& a) {
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 16 * i + row_of(2 * half);
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int right = 0; right < 2; ++right)
          store_shared(
              reinterpret_cast<uint32_t*>(tile.at(r, chunk + 2 * s + right) + 2 * column_of(0)),
              a.fragments[i][s][2 * right + half]);
    }
}

// An operand whose rows or columns, whichever are not summed over, begin 16 · `skip` later.
template <class Operand>
struct Skipping {
  Operand operand;
  int skip;

  FUSEDATTN_DEVICE Pack<uint32_t, 4> fragment(int i, int s) const {
    return operand.fragment(i + skip, s);
  }
};

// --- before: the terms of each query -------------------------------------------------------------

constexpr int terms_threads = 256, terms_team = 8;  // threads of a query

template <class T, bool ruled>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(terms_threads, 4)
    attention_backward_rows(const FUSEDATTN_GRID_CONSTANT Backward p) {
  constexpr int N = pack_size<T>;
  const int rank = thread() % terms_team;
  const int64_t at = block() * (terms_threads / terms_team) + thread() / terms_team;
  const int64_t head = at / p.rows, of_head = at - head * p.rows;
  const int64_t b = head / p.heads(), h = head - b * p.heads();
  const int tile_rows = ruled ? int(p.tile_rows) : row_padding;
  const auto [sequence, number, tile] =
      place_of<ruled>(p, int(b), int(of_head / tile_rows), Side::queries, tile_rows);
  const int64_t i = int64_t(tile) * tile_rows + of_head % tile_rows;
  const bool exists = i < sequence.seq_q;
  const int64_t row = sequence.query_row(int(i));
  float sum = 0.0f;
  if (exists && p.dout) {
    const T *out = p.out.at<T>(b, h, row), *dout = p.dout.at<T>(b, h, row);
    for (int64_t c = rank * N; c < p.head_dim_v(); c += terms_team * N) {
      const auto x = widen(load<N>(out + c)), dx = widen(load<N>(dout + c));
#pragma unroll
      for (int e = 0; e < N; ++e) sum = fma(x[e], dx[e], sum);
    }
  }
#pragma unroll
  for (int apart = terms_team / 2; apart > 0; apart /= 2) sum += shuffle_xor(sum, apart);
  if (rank != 0) return;
  float shift = INFINITY, delta = 0.0f;
  const float lse = exists ? load(p.lse.at<float>(b, h, row)) : -INFINITY;
  if (lse != -INFINITY) {
    shift = ruled ? lse : lse * log2_e;
    delta = present(p.dlse) ? sum - load(p.dlse.at<float>(b, h, row)) : sum;
  }
  if constexpr (scales_ds<T>) {
    const float scale =
        ds_scale_from(p.norms + norms_of_head * (head / p.group()), p.rules.keep_scale);
    delta *= scale;
    if (of_head == 0) store(p.ds_scales + head, scale);
  }
  store(p.shift + at, shift);
  store(p.delta + at, delta);
}

// --- a tile of keys ------------------------------------------------------------------------------

template <class T, int head_dim, KeysShape shape, bool ruled>
class KeysKernel {
 public:
  static constexpr int threads = shape.threads();

  FUSEDATTN_DEVICE explicit KeysKernel(const Backward& params) : p(params) {
    const Work work =
        work_of(uint32_t(block()), p.tiles, uint32_t(p.batch() * p.heads_kv()), p.section);
    heads_end = (uint32_t(work.head) + 1) * p.heads_together;
    // The first keys are seen by most queries where causal: they begin first.
    const auto place =
        place_of<ruled>(p, int(key_head().b), int(p.tiles - 1 - work.tile), Side::keys, shape.keys);
    sequence = place.sequence;
    number = place.b;
    first_key = place.tile * shape.keys;
    row = warp() / shape.column_warps * rows_of_warp;
    part = warp() % shape.column_warps;
  }

  FUSEDATTN_DEVICE void run() {
    clear(dk);
    clear(dv);
    clear<m>(key_sums);
    const auto [b, h] = key_head();
    copy_tile<threads>(k_tile(), rows_of(p.k, b, h, sequence.first_k), first_key, sequence.seq_k,
                       width_of(p.k));
    copy_tile<threads>(v_tile(), rows_of(p.v, b, h, sequence.first_k), first_key, sequence.seq_k,
                       width_of(p.v));
    commit_copies();  // of no query, too
    At at = {heads_end - p.heads_together, tiles().begin};
    begin(at, 0);
    for (int stage = 0; exists(at); at = after(at)) {
      wait_copies<0>();
      sync_block();  // this tile has landed; all have left the one before
      if (shape.stages == 2) begin(after(at), 1 - stage);
      accumulate(at, stage, [&] {
        if (shape.stages == 1) begin(after(at), 0);
      });
      if constexpr (ruled)
        if (after(at).head != at.head) {
          if (p.slope_sums != nullptr) write_slope(at.head);
          if (p.bias_sums.one_row()) write_key_sums(at.head);
        }
      if (shape.stages == 2) stage = 1 - stage;
    }
    wait_copies<0>();
    sync_block();
    write();
    if constexpr (ruled)
      if (present(p.bias_sums.to) && !p.bias_sums.adds) clear_bias();
  }

 private:
  static constexpr int key_warps = shape.warps / shape.column_warps;
  static constexpr int rows_of_warp = shape.keys / key_warps, m = rows_of_warp / 16;
  static constexpr int columns = head_dim / shape.column_warps;  // of dK and dV, of a warp
  static constexpr int queries_of_warp = shape.queries / shape.column_warps;
  static constexpr int step = shape.step;  // queries whose scores a warp has at a time
  static constexpr bool shared_p = shape.column_warps > 1;
  static_assert(shape.keys % (16 * key_warps) == 0 && columns % 16 == 0);
  static_assert(queries_of_warp % step == 0 && step % 16 == 0);
  static_assert(!shared_p || queries_of_warp == step);
  using Stays = Tile<shape.keys, head_dim>;            // of K, V
  using Passes = Tile<shape.queries, head_dim>;        // of Q, dout
  using ScoresTile = Tile<shape.keys, shape.queries>;  // of pᵀ, dsᵀ
  using DqShape = DqFragments<head_dim, shape>;
  using Held = HeldA<T, m, step / 16>;
  using Scores = ScoresOf<true, m, step / 8>;

  // Shared memory, in this order.
  static constexpr int stage_bytes = 2 * Passes::bytes, v_at = Stays::bytes, passes_at = 2 * v_at;
  static constexpr int ds_at = passes_at + shape.stages * stage_bytes;
  static constexpr int p_at = ds_at + ScoresTile::bytes;
  static constexpr int terms_at = p_at + (shared_p ? ScoresTile::bytes : 0);
  static_assert(terms_at + shape.stages * 8 * shape.queries == shape.shared_bytes);

  // A tile of queries of one head of B · Hq.
  struct At {
    uint32_t head;
    int tile;

    FUSEDATTN_DEVICE int query() const { return tile * shape.queries; }
  };

  FUSEDATTN_DEVICE Head key_head() const {
    return {heads_end / p.heads_together - 1, p.heads_kv()};
  }

  FUSEDATTN_DEVICE Stays k_tile() const { return {shared_memory()}; }
  FUSEDATTN_DEVICE Stays v_tile() const { return {shared_memory() + v_at}; }
  FUSEDATTN_DEVICE Passes q_tile(int stage) const {
    return {shared_memory() + passes_at + stage * stage_bytes};
  }
  FUSEDATTN_DEVICE Passes dout_tile(int stage) const {
    return {shared_memory() + passes_at + stage * stage_bytes + Passes::bytes};
  }
  FUSEDATTN_DEVICE ScoresTile ds_tile() const { return {shared_memory() + ds_at}; }
  FUSEDATTN_DEVICE ScoresTile p_tile() const { return {shared_memory() + p_at}; }
  // The shifts of a tile's queries, then their Δ.
  FUSEDATTN_DEVICE float* terms(int stage) const {
    return reinterpret_cast<float*>(shared_memory() + terms_at) + stage * 2 * shape.queries;
  }

  // Of queries. Worked out each time it is asked for, to stay in no registers.
  FUSEDATTN_DEVICE Tiles tiles() const {
    return query_tiles(sequence, anew(first_key), shape.queries, shape.keys);
  }

  FUSEDATTN_DEVICE bool exists(const At& at) const {
    return at.tile < tiles().end && at.head < uint32_t(anew(int(heads_end)));
  }

  FUSEDATTN_DEVICE At after(const At& at) const {
    const Tiles all = tiles();
    return at.tile + 1 < all.end ? At{at.head, at.tile + 1} : At{at.head + 1, all.begin};
  }

  FUSEDATTN_DEVICE void begin(const At& at, int stage) const {
    if (!exists(at)) return;
    const auto [b, h] = Head(at.head, p.heads());
    copy_tile<threads>(q_tile(stage), rows_of(p.q, b, h, sequence.first_q), at.query(),
                       sequence.seq_q, width_of(p.q));
    copy_tile<threads>(dout_tile(stage), rows_of(p.dout, b, h, sequence.first_q), at.query(),
                       sequence.seq_q, width_of(p.dout));
    constexpr int each = shape.queries / 4;  // copies of 16 bytes
    static_assert(2 * each <= threads);
    const int rank = anew(thread());
    if (rank < 2 * each) {
      const float* from = rank < each ? p.shift : p.delta;
      const int first = p.first_tile<ruled>(sequence, number) * shape.queries + at.query();
      copy_async(terms(stage) + 4 * rank, from + at.head * p.rows + first + rank % each * 4, true);
    }
    commit_copies();
  }

  // Adds what the queries of one tile give. `all_read` is called where nobody needs them any more.
  template <class Function>
  FUSEDATTN_DEVICE void accumulate(const At& at, int stage, const Function& all_read) {
    const Passes q = q_tile(stage), dout = dout_tile(stage);
    Held weights, ds;
    if constexpr (shared_p) {
      const int query = part * queries_of_warp;
      scores_of(weights, ds, at, query, stage);
      put(p_tile(), anew(row), query / chunk_size, weights);
      put(ds_tile(), anew(row), query / chunk_size, ds);
      sync_block();
      const int skip = part * columns / 16;
      multiply<T, shape.queries / 16>(dv, OperandA<ScoresTile, Sum::along>(p_tile(), anew(row)),
                                      Skipping{OperandB<Passes, Sum::across>(dout), skip});
      multiply<T, shape.queries / 16>(dk, OperandA<ScoresTile, Sum::along>(ds_tile(), anew(row)),
                                      Skipping{OperandB<Passes, Sum::across>(q), skip});
      if (shape.stages == 1) sync_block();
    } else {
#pragma unroll 1
      for (int query = 0; query < shape.queries; query += step) {
        scores_of(weights, ds, at, query, stage);
        put(ds_tile(), anew(row), query / chunk_size, ds);
        multiply<T, step / 16>(dv, weights, OperandB<Passes, Sum::across>(dout, query));
        multiply<T, step / 16>(dk, ds, OperandB<Passes, Sum::across>(q, query));
      }
      sync_block();
    }
    all_read();
    if (p.dq_sum != nullptr) add_dq(at);
  }

  // pᵀ and dsᵀ of `step` queries of a tile, from `query` on.
  FUSEDATTN_DEVICE void scores_of(Held& weights, Held& ds, const At& at, int query, int stage) {
    typename Scores::Fragments s, dp;
    clear(s);
    clear(dp);
    multiply<T, head_dim / 16>(s, OperandA<Stays, Sum::along>(k_tile(), row),
                               OperandB<Passes, Sum::along>(q_tile(stage), query));
    if constexpr (!ruled) p.rules.apply(s);
    multiply<T, head_dim / 16>(dp, OperandA<Stays, Sum::along>(v_tile(), row),
                               OperandB<Passes, Sum::along>(dout_tile(anew(stage)), query));
    const auto shift = [&](int j) {
      return load_shared<2>(terms(stage) + query + 8 * j + column_of(0));
    };
    const auto delta = [&](int j) {
      return load_shared<2>(terms(stage) + shape.queries + query + 8 * j + column_of(0));
    };
    if constexpr (ruled) {
      const HeadScores<T> scores(p, p.rules, sequence, number, int(Head(at.head, p.heads()).h));
      Scores::template differentiate<T>(
          s, dp, p.rules, scores, at.query() + query, first_key + row, tiles().masked(at.tile),
          ds_scale<T>(p, at.head), shift, delta,
          [&](int, int k, const Pack<float, 4>& taken, int i, int j) {
            if (p.slope_sums != nullptr)
#pragma unroll
              for (int e = 0; e < 4; ++e)
                slope_sum =
                    fma(taken[e], scores.distance(i + query_step<true>(e), j + key_step<true>(e)),
                        slope_sum);
            if (present(p.bias_sums.to)) add_to_bias(taken, k, at.head, i, j);
          });
    } else {
      Scores::exponentiate(s, p.rules.factor, shift);
      if (tiles().masked(at.tile)) Scores::hide(s, sequence, at.query() + query, first_key + row);
      Scores::template differentiate<T>(dp, s, ds_scale<T>(p, at.head), delta);
      Scores::chain(dp, s, p.rules, shift);
    }
    weights.round(s);
    ds.round(dp);
  }

  // dQ += ds K.
  FUSEDATTN_DEVICE void add_dq(const At& at) const {
    Pack<float, 4> dq[DqShape::m][DqShape::n];
    clear(dq);
    multiply<T, shape.keys / 16>(
        dq, Skipping{OperandA<ScoresTile, Sum::across>(ds_tile(), 0), DqShape::row() / 16},
        Skipping{OperandB<Stays, Sum::across>(k_tile(), 0), DqShape::column() / 16});
    float* sum =
        p.dq_sum + DqShape::at(p, at.head, p.first_tile<ruled>(sequence, number) + at.tile);
#pragma unroll
    for (int i = 0; i < DqShape::m; ++i)
#pragma unroll
      for (int j = 0; j < DqShape::n; ++j) DqShape::add(sum, i, j, dq[i][j]);
  }

  // What the block adds to the slope of a head of B · Hq, from each of its warps.
  FUSEDATTN_DEVICE void write_slope(uint32_t head) {
#pragma unroll
    for (int apart = warp_size / 2; apart > 0; apart /= 2)
      slope_sum += shuffle_xor(slope_sum, apart);
    const Work work = work_of(uint32_t(anew(int(block()))), p.tiles,
                              uint32_t(p.batch() * p.heads_kv()), p.section);
    const int64_t tile = int64_t(head) * p.tiles + (p.tiles - 1 - work.tile);
    if (lane() == 0)
      store(p.slope_sums + tile * shape.warps + warp(), -slope_sum * inverse_ds_scale<T>(p, head));
    slope_sum = 0.0f;
  }

  // e · ds of fragments k of keys, from key j on, and queries from i on.
  FUSEDATTN_DEVICE void add_to_bias(const Pack<float, 4>& ds, int k, uint32_t head, int i, int j) {
    if (p.bias_sums.one_row()) {
      key_sums[k][0] += ds[0] + ds[1];
      key_sums[k][1] += ds[2] + ds[3];
      return;
    }
    const auto [b, h] = Head(head, p.heads());
    add_bias_gradient<T>(p, p.bias_sums, b, h, ds, inverse_ds_scale<T>(p, head), i, j);
  }

  // What the block adds to the one row of a bias, of a head of B · Hq.
  FUSEDATTN_DEVICE void write_key_sums(uint32_t head) {
    const auto [b, h] = Head(head, p.heads());
    add_key_sums<m>(p, p.bias_sums, b, h, key_sums, inverse_ds_scale<T>(p, head), first_key + row);
    clear<m>(key_sums);
  }

  // Zeros in dbias where no tile of queries was visited.
  FUSEDATTN_DEVICE void clear_bias() const {
    static_assert(threads % shape.keys == 0);
    const int j = first_key + thread() % shape.keys, first = thread() / shape.keys;
    if (!below(j, p.longest_k())) return;
    const int begin = tiles().begin * shape.queries, end = tiles().end * shape.queries;
    for (uint32_t head = heads_end - p.heads_together; head < heads_end; ++head) {
      const auto [b, h] = Head(head, p.heads());
      const auto clear_rows = [&](int i, int64_t past) {
        for (; below(i, past); i += threads / shape.keys)
          store_bias<T>(p.bias_sums.to, b, h, i, j, 0.0f);
      };
      clear_rows(first, begin < p.longest_q() ? begin : p.longest_q());
      clear_rows(first + end, p.longest_q());
    }
  }

  // dK and dV, through the tiles of K and V.
  FUSEDATTN_DEVICE void write() {
    round_to<T>(k_tile(), row, part * columns / chunk_size, dk,
                gradient_scale<T>(p, heads_end - 1));
    round_to<T>(v_tile(), row, part * columns / chunk_size, dv, ruled ? p.rules.keep_scale : 1.0f);
    sync_block();
    constexpr int rows = shape.keys / shape.warps;
    // Of keys that do not exist, too, but of no other sequence.
    const bool packed = ruled && present(p.cu_seqlens_k);
    const int r = warp() * rows, keys = packed ? sequence.seq_k : int(p.longest_k());
    const auto [b, h] = key_head();
    write_rows<rows>(k_tile(), r, p.dk.at<uint16_t>(b, h, sequence.first_k), p.dk.stride[2],
                     first_key + r, keys, width_of(p.dk));
    write_rows<rows>(v_tile(), r, p.dv.at<uint16_t>(b, h, sequence.first_k), p.dv.stride[2],
                     first_key + r, keys, width_of(p.dv));
  }

  const Backward& p;
  uint32_t heads_end;     // past the heads of queries, of B · Hq, whose keys these are
  int first_key, number;  // of the sequence
  Sequence<int, ruled> sequence;
  int row, part;  // of the tile's keys; of the warps that share them
  float slope_sum = 0.0f;
  KeySums<m> key_sums;
  Pack<float, 4> dk[m][columns / 8], dv[m][columns / 8];
};

// (As parameters of a kernel, nvcc's host code takes no structs.)
template <class T, int head_dim, Variant variant>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(keys_shape(head_dim, variant).threads(),
                                              keys_shape(head_dim, variant).blocks)
    attention_backward_keys(const FUSEDATTN_GRID_CONSTANT Backward p) {
  KeysKernel<T, head_dim, keys_shape(head_dim, variant), variant == Variant::ruled>(p).run();
}

// --- after: dQ from its sums ---------------------------------------------------------------------

template <class T, int head_dim, Variant variant>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(keys_shape(head_dim, variant).threads(), 1)
    attention_backward_round(const FUSEDATTN_GRID_CONSTANT Backward p) {
  constexpr KeysShape shape = keys_shape(head_dim, variant);
  using Shape = DqFragments<head_dim, shape>;
  const int64_t head = block() / p.dq_tiles, h = head % p.heads();
  const int at = int(block() - head * p.dq_tiles);
  const auto [sequence, b, tile_of] = place_of<variant == Variant::ruled>(
      p, int(head / p.heads()), at, Side::queries, shape.queries);
  const int query = tile_of * shape.queries;
  const float* sum = p.dq_sum + Shape::at(p, uint32_t(head), at);
  Pack<float, 4> dq[Shape::m][Shape::n];
#pragma unroll
  for (int i = 0; i < Shape::m; ++i)
#pragma unroll
    for (int j = 0; j < Shape::n; ++j) dq[i][j] = Shape::read(sum, i, j);
  const Tile<shape.queries, head_dim> tile = {shared_memory()};
  round_to<T>(tile, Shape::row(), Shape::column() / chunk_size, dq,
              gradient_scale<T>(p, uint32_t(head)));
  sync_block();
  constexpr int rows = shape.queries / shape.warps;
  const int r = warp() * rows;
  write_rows<rows>(tile, r, p.dq.at<uint16_t>(b, h, sequence.first_q), p.dq.stride[2], query + r,
                   sequence.seq_q, width_of(p.dq));
}

}  // namespace fusedattn::cuda
