// The gradient of attention's bias in order, for deterministic calls whose bias is broadcast: ds,
// summed over the dimensions along which it was; all others have it from attention_backward_keys,
// by attention_backward_bias_sums.cuh. No more than its own size is in memory. The maths stands in
// attention_backward.cuh.
//
// A block has a tile of the bias and computes ds once more for all that it was added to, in their
// order: the result is the same each time, and no two blocks write to one element. Of a bias that
// has one row or one column a block has all tiles in that direction.
#pragma once

#include "attention_backward.cuh"

namespace fusedattn::cuda {

template <class T, int head_dim, QueriesShape shape>
class BiasKernel {
 public:
  static constexpr int threads = shape.threads();

  FUSEDATTN_DEVICE explicit BiasKernel(const Backward& params) : p(params) {
    const int64_t* const size = p.dbias.shape;
    const int64_t head = block() / (down(p) * across(p)), tile = block() % (down(p) * across(p));
    bias_b = int(head / size[1]);
    bias_h = int(head % size[1]);
    tile_q = int(tile / across(p));
    tile_k = int(tile % across(p));
  }

  // Tiles of a head of the bias, of queries and of keys.
  FUSEDATTN_MEMBER static int64_t down(const AttentionBackward& p) {
    return p.dbias.shape[2] == 1 ? 1 : ceil_div(p.longest_q(), shape.queries);
  }
  FUSEDATTN_MEMBER static int64_t across(const AttentionBackward& p) {
    return p.dbias.shape[3] == 1 ? 1 : ceil_div(p.longest_k(), shape.keys);
  }

  FUSEDATTN_DEVICE void run() {
    clear(sum);
    const int64_t* const size = p.dbias.shape;
    const int b_end = size[0] == 1 ? int(p.batch()) : bias_b + 1;
    const int h_end = size[1] == 1 ? int(p.heads()) : bias_h + 1;
    const int q_end = one_row() ? ceil_div(int(p.longest_q()), shape.queries) : tile_q + 1;
#pragma unroll 1
    for (int b = bias_b; b < b_end; ++b) {
      const Sequence<int> sequence = sequence_of<true>(p, b);
#pragma unroll 1
      for (int h = bias_h; h < h_end; ++h)
#pragma unroll 1
        for (int i = tile_q; i < q_end; ++i) {
          const Tiles tiles = key_tiles(sequence, i * shape.queries, shape.queries, shape.keys);
          const int first = tiles.begin > tile_k ? tiles.begin : tile_k;
          const int end = one_column() || tiles.end <= tile_k ? tiles.end : tile_k + 1;
#pragma unroll 1
          for (int j = first; j < end; ++j)
            accumulate(sequence, b, h, i * shape.queries, j * shape.keys, tiles.masked(j));
        }
    }
    if (one_row() || one_column())
      write_sums();
    else
      write();
  }

 private:
  static constexpr int rows_of_warp = shape.queries / shape.warps, m = rows_of_warp / 16;
  static constexpr int n = shape.keys / 8;
  using QueryTile = Tile<shape.queries, head_dim>;  // of Q, dout
  using KeyTile = Tile<shape.keys, head_dim>;       // of K, V
  using Weights = ScoresOf<false, m, n>;
  static_assert(2 * (QueryTile::bytes + KeyTile::bytes) == shape.shared_bytes);
  static_assert(4 * shape.queries * (shape.keys + 1) <= shape.shared_bytes);
  static_assert(shape.queries <= threads && shape.keys <= threads);

  FUSEDATTN_DEVICE bool one_row() const { return p.dbias.shape[2] == 1; }
  FUSEDATTN_DEVICE bool one_column() const { return p.dbias.shape[3] == 1; }

  FUSEDATTN_DEVICE void accumulate(const Sequence<int>& sequence, int b, int h, int query, int key,
                                   bool masked) {
    const QueryTile q = {shared_memory()}, dout = {shared_memory() + QueryTile::bytes};
    const KeyTile k = {dout.data + QueryTile::bytes}, v = {k.data + KeyTile::bytes};
    const int64_t kv_head = h / p.group();
    const uint32_t head = uint32_t(b) * uint32_t(p.heads()) + uint32_t(h);
    const int row = warp() * rows_of_warp;
    copy_tile<threads>(q, rows_of(p.q, b, h, 0), query, sequence.seq_q, width_of(p.q));
    copy_tile<threads>(dout, rows_of(p.dout, b, h, 0), query, sequence.seq_q, width_of(p.dout));
    copy_tile<threads>(k, rows_of(p.k, b, kv_head, 0), key, sequence.seq_k, width_of(p.k));
    copy_tile<threads>(v, rows_of(p.v, b, kv_head, 0), key, sequence.seq_k, width_of(p.v));
    commit_copies();
    wait_copies<0>();
    sync_block();
    typename Weights::Fragments s, dp;
    clear(s);
    clear(dp);
    multiply<T, head_dim / 16>(s, OperandA<QueryTile, Sum::along>(q, row),
                               OperandB<KeyTile, Sum::along>(k));
    multiply<T, head_dim / 16>(dp, OperandA<QueryTile, Sum::along>(dout, row),
                               OperandB<KeyTile, Sum::along>(v));
    sync_block();  // all have read the tiles
    const int64_t at = head * p.rows + query + row + row_of(0);
    const auto of_rows = [&](const float* terms, int i) {
      return Pack<float, 2>{load(terms + at + 16 * i), load(terms + at + 16 * i + 8)};
    };
    const HeadScores<T> scores(p, p.rules, sequence, b, h);
    const float inverse = inverse_ds_scale<T>(p, head);
    Weights::template differentiate<T>(
        s, dp, p.rules, scores, query + row, key, masked, ds_scale<T>(p, head),
        [&](int i) { return of_rows(p.shift, i); }, [&](int i) { return of_rows(p.delta, i); },
        [&](int i, int j, const Pack<float, 4>& ds, int, int) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[i][j][e] = fma(ds[e], inverse, sum[i][j][e]);
        });
  }

  FUSEDATTN_DEVICE void put(int64_t i, int64_t j, float x) const {
    if (p.dbias.dtype == DType::f32)
      store(p.dbias.at<float>(bias_b, bias_h, i, j), x);
    else
      store(p.dbias.at<T>(bias_b, bias_h, i, j), from_float<T>(x));
  }

  FUSEDATTN_DEVICE void write() const {
    const int row = tile_q * shape.queries + warp() * rows_of_warp + row_of(0);
    const int column = tile_k * shape.keys + column_of(0);
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
      for (int j = 0; j < n; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int query = row + 16 * i + query_step<false>(e);
          const int key = column + 8 * j + key_step<false>(e);
          if (below(query, p.longest_q()) && below(key, p.longest_k()))
            put(query, key, sum[i][j][e]);
        }
  }

  // Of one row the sum over the tile's queries, of one column that over its keys.
  FUSEDATTN_DEVICE void write_sums() const {
    constexpr int stride = shape.keys + 1;  // threads read different banks, in both directions
    float* const all = reinterpret_cast<float*>(shared_memory());
    const int row = warp() * rows_of_warp + row_of(0);
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
      for (int j = 0; j < n; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          store_shared(all + (row + 16 * i + query_step<false>(e)) * stride + 8 * j + column_of(0) +
                           key_step<false>(e),
                       sum[i][j][e]);
    sync_block();
    const bool down = one_row();
    const int count = down ? shape.keys : shape.queries, rank = thread();
    const int summands = down ? shape.queries : shape.keys, step = down ? stride : 1;
    float total = 0.0f;
    if (rank < count)
      for (int i = 0; i < summands; ++i)
        total += load_shared(all + rank * (down ? 1 : stride) + i * step);
    if (down && one_column()) {
      if (rank < count) store_shared(all + rank, total);  // that only this thread has read
      sync_block();
      total = 0.0f;
      if (rank == 0)
        for (int i = 0; i < count; ++i) total += load_shared(all + i);
      if (rank == 0) put(0, 0, total);
    } else if (rank < count) {
      const int at = rank + (down ? tile_k * shape.keys : tile_q * shape.queries);
      if (below(at, down ? p.longest_k() : p.longest_q())) put(down ? 0 : at, down ? at : 0, total);
    }
  }

  const Backward& p;
  int bias_b, bias_h, tile_q, tile_k;
  Pack<float, 4> sum[m][n];
};

template <class T, int head_dim>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(bias_shape(head_dim).threads(),
                                              bias_shape(head_dim).blocks)
    attention_backward_bias(const FUSEDATTN_GRID_CONSTANT Backward p) {
  BiasKernel<T, head_dim, bias_shape(head_dim)>(p).run();
}

}  // namespace fusedattn::cuda
