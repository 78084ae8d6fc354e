// dQ of attention with no atomic additions, the same bit for bit each time: a tile of queries of
// one head, over its keys in their order. It computes the scores and dp once more, and keeps no
// more in memory than the forward does. The maths stands in attention_backward.cuh.
//
// As in the forward, a warp's part of ds comes out in the layout that ds · k takes it in.
#pragma once

#include "attention_backward.cuh"

namespace fusedattn::cuda {

template <class T, int head_dim, QueriesShape shape, bool ruled>
class QueriesKernel {
 public:
  static constexpr int threads = shape.threads();

  FUSEDATTN_DEVICE explicit QueriesKernel(const Backward& params) : p(params) {
    const int heads = int(p.heads());
    const Work work = work_of(uint32_t(block()), p.tiles, uint32_t(p.batch()) * heads, p.section);
    head = uint32_t(work.head);
    h = work.head % heads;
    const auto place =
        place_of<ruled>(p, work.head / heads, work.tile, Side::queries, shape.queries);
    b = place.b;
    first_query = place.tile * shape.queries;
    sequence = place.sequence;
    tiles = key_tiles(sequence, first_query, shape.queries, shape.keys);
    row = warp() * rows_of_warp;
  }

  FUSEDATTN_DEVICE void run() {
    clear(dq);
    copy_tile<threads>(q_tile(), rows_of(p.q, b, h, sequence.first_q), first_query, sequence.seq_q,
                       width_of(p.q));
    copy_tile<threads>(dout_tile(), rows_of(p.dout, b, h, sequence.first_q), first_query,
                       sequence.seq_q, width_of(p.dout));
    commit_copies();  // of no key, too
    read_terms();
    if (tiles.begin < tiles.end) begin(tiles.begin, 0);
    int stage = 0;
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
      wait_copies<0>();
      sync_block();  // this tile has landed; all have left the one before
      const bool more = tile + 1 < tiles.end;
      if (shape.stages == 2 && more) begin(tile + 1, 1 - stage);
      accumulate(tile, stage);
      if (shape.stages == 1) {
        sync_block();
        if (more) begin(tile + 1, 0);
      } else {
        stage = 1 - stage;
      }
    }
    wait_copies<0>();
    sync_block();
    // Every warp writes over its own rows of Q.
    round_to<T>(q_tile(), row, 0, dq, gradient_scale<T>(p, head));
    sync_warp();
    write_rows<rows_of_warp>(q_tile(), row, p.dq.at<uint16_t>(b, h, sequence.first_q),
                             p.dq.stride[2], first_query + row, sequence.seq_q, width_of(p.dq));
  }

 private:
  static constexpr int rows_of_warp = shape.queries / shape.warps, m = rows_of_warp / 16;
  static constexpr int step = shape.step;  // keys whose scores a warp has at a time
  static_assert(shape.queries % (16 * shape.warps) == 0 && shape.keys % step == 0);
  using Stays = Tile<shape.queries, head_dim>;  // of Q, dout
  using Passes = Tile<shape.keys, head_dim>;    // of K, V
  using Scores = ScoresOf<false, m, step / 8>;
  static_assert(2 * (Stays::bytes + shape.stages * Passes::bytes) == shape.shared_bytes);

  FUSEDATTN_DEVICE Stays q_tile() const { return {shared_memory()}; }
  FUSEDATTN_DEVICE Stays dout_tile() const { return {shared_memory() + Stays::bytes}; }
  FUSEDATTN_DEVICE Passes k_tile(int stage) const {
    return {shared_memory() + 2 * Stays::bytes + stage * 2 * Passes::bytes};
  }
  FUSEDATTN_DEVICE Passes v_tile(int stage) const { return {k_tile(stage).data + Passes::bytes}; }

  FUSEDATTN_DEVICE void begin(int tile, int stage) const {
    const int64_t kv_head = h / p.group();
    const int key = tile * shape.keys;
    copy_tile<threads>(k_tile(stage), rows_of(p.k, b, kv_head, sequence.first_k), key,
                       sequence.seq_k, width_of(p.k));
    copy_tile<threads>(v_tile(stage), rows_of(p.v, b, kv_head, sequence.first_k), key,
                       sequence.seq_k, width_of(p.v));
    commit_copies();
  }

  FUSEDATTN_DEVICE void read_terms() {
    const int first = p.first_tile<ruled>(sequence, b) * int(p.tile_rows) + first_query;
    const int64_t at = head * p.rows + first + row;
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = 16 * i + row_of(2 * half);
        // Past the end of a packed sequence lie the terms of the next one, or none.
        const bool exists = !ruled || first_query + row + r < sequence.seq_q;
        shift[i][half] = exists ? load(p.shift + at + r) : INFINITY;
        delta[i][half] = exists ? load(p.delta + at + r) : 0.0f;
      }
  }

  FUSEDATTN_DEVICE void accumulate(int tile, int stage) {
#pragma unroll 1
    for (int key = 0; key < shape.keys; key += step) {
      typename Scores::Fragments weights, ds;
      clear(weights);
      multiply<T, head_dim / 16>(weights, OperandA<Stays, Sum::along>(q_tile(), row),
                                 OperandB<Passes, Sum::along>(k_tile(stage), key));
      const auto shift_of = [&](int i) { return shift[i]; };
      const auto delta_of = [&](int i) { return delta[i]; };
      if constexpr (!ruled) {
        p.rules.apply(weights);
        Scores::exponentiate(weights, p.rules.factor, shift_of);
        if (tiles.masked(tile))
          Scores::hide(weights, sequence, first_query + row, tile * shape.keys + key);
      }
      clear(ds);
      multiply<T, head_dim / 16>(ds, OperandA<Stays, Sum::along>(dout_tile(), row),
                                 OperandB<Passes, Sum::along>(v_tile(stage), key));
      if constexpr (ruled) {
        const HeadScores<T> scores(p, p.rules, sequence, b, h);
        Scores::template differentiate<T>(weights, ds, p.rules, scores, first_query + row,
                                          tile * shape.keys + key, tiles.masked(tile),
                                          ds_scale<T>(p, head), shift_of, delta_of,
                                          [](int, int, const Pack<float, 4>&, int, int) {});
      } else {
        Scores::template differentiate<T>(ds, weights, ds_scale<T>(p, head), delta_of);
        Scores::chain(ds, weights, p.rules, shift_of);
      }
      HeldA<T, m, step / 16> held;
      held.round(ds);
      multiply<T, step / 16>(dq, held, OperandB<Passes, Sum::across>(k_tile(stage), key));
    }
  }

  const Backward& p;
  int b, h;              // of the sequence; of Hq
  uint32_t head;         // of B · Hq
  int first_query, row;  // of the block; of the warp, in the tile
  Sequence<int, ruled> sequence;
  Tiles tiles;  // of keys
  Pack<float, 2> shift[m], delta[m];
  Pack<float, 4> dq[m][head_dim / 8];
};

template <class T, int head_dim, Variant variant>
FUSEDATTN_KERNEL void FUSEDATTN_LAUNCH_BOUNDS(queries_shape(head_dim, variant).threads(),
                                              queries_shape(head_dim, variant).blocks)
    attention_backward_queries(const FUSEDATTN_GRID_CONSTANT Backward p) {
  QueriesKernel<T, head_dim, queries_shape(head_dim, variant), variant == Variant::ruled>(p).run();
}

}  // namespace fusedattn::cuda
