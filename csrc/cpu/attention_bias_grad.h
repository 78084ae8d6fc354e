// The gradient of attention's bias: ds, summed over the dimensions along which it was broadcast;
// and of the slopes of ALiBi, likewise, times minus the distances.
//
// A task owns a tile of the bias and recomputes ds for all that it was added to, so no two threads
// ever write to one element, the sum has a fixed order, and nothing larger than a tile is held.
// Sums run in S over a few additions and then in double, as those of the norms over rows do.
#pragma once

#include "attention_tile.h"

namespace fusedattn::FUSEDATTN_ISA {

template <class E, class T>
class BiasGradTask {
  typedef stat_of<E> S;
  typedef unit_of<E> Unit;
  static constexpr int64_t block_q = 96, block_k = 256;
  static constexpr int64_t per_flush = 64;  // additions to an element in S
  const AttentionBackward& f;
  const TensorView& out;
  const bool slopes;
  const Scores<S>& scores;
  const int64_t d, dv, units_d, units_dv, depth_d, depth_dv;
  Rows<Unit> q, o;
  Panels<Unit> kt, vt;
  S *s, *dp, *recent, *row;
  uint8_t* keep;
  double* total = nullptr;  // if there are more
  int64_t pending = 0;      // additions to an element of `recent`
  Unit* strip;
  Sequence<int64_t> sequence{};

 public:
  BiasGradTask(const AttentionBackward& f, const Scores<S>& scores, const TensorView& out,
               bool slopes, Arena& arena)
      : f(f),
        out(out),
        slopes(slopes),
        scores(scores),
        d(f.head_dim()),
        dv(f.head_dim_v()),
        units_d(row_units<E>(d)),
        units_dv(row_units<E>(dv)),
        depth_d(panel_depth<E>(d)),
        depth_dv(panel_depth<E>(dv)) {
    q = {arena.take<Unit>(E::planes * block_q * units_d), units_d, block_q * units_d};
    o = {arena.take<Unit>(E::planes * block_q * units_dv), units_dv, block_q * units_dv};
    kt = {arena.take<Unit>(E::planes * block_k * depth_d), depth_d, block_k * depth_d};
    vt = {arena.take<Unit>(E::planes * block_k * depth_dv), depth_dv, block_k * depth_dv};
    s = arena.take<S>(block_q * block_k);
    dp = arena.take<S>(block_q * block_k);
    recent = arena.take<S>(block_q * block_k);
    if (additions() > per_flush) total = arena.take<double>(block_q * block_k);
    row = arena.take<S>(block_k);
    keep = arena.take<uint8_t>(block_k);
    strip = arena.take<Unit>(E::planes * larger(units_d, units_dv) *
                             (vector_bytes / int64_t(sizeof(Unit))));
  }

  // Tiles along the queries and keys: one for all where the bias is broadcast.
  int64_t tiles_q() const {
    return out.shape[2] == 1 ? 1 : (f.longest_q() + block_q - 1) / block_q;
  }
  int64_t tiles_k() const {
    return out.shape[3] == 1 ? 1 : (f.longest_k() + block_k - 1) / block_k;
  }

  void run(int64_t bias_b, int64_t bias_h, int64_t tile_q, int64_t tile_k) {
    const int64_t b_end = out.shape[0] == 1 ? f.sequences() : bias_b + 1;
    const int64_t h_end = out.shape[1] == 1 ? f.heads() : bias_h + 1;
    const int64_t i_end =
        out.shape[2] == 1 ? f.longest_q() : smaller(f.longest_q(), (tile_q + 1) * block_q);
    const int64_t j_end =
        out.shape[3] == 1 ? f.longest_k() : smaller(f.longest_k(), (tile_k + 1) * block_k);
    const int64_t rows = out.shape[2] == 1 ? 1 : i_end - tile_q * block_q;
    const int64_t columns = out.shape[3] == 1 ? 1 : j_end - tile_k * block_k;
    memset(recent, 0, rows * block_k * sizeof(S));
    if (total) memset(total, 0, rows * block_k * sizeof(double));
    for (int64_t b = bias_b; b < b_end; ++b) {
      sequence = f.sequence(b);
      const int64_t past = smaller(j_end, sequence.seq_k), past_q = smaller(i_end, sequence.seq_q);
      for (int64_t h = bias_h; h < h_end; ++h)
        for (int64_t j0 = tile_k * block_k; j0 < past; j0 += block_k)
          for (int64_t i0 = tile_q * block_q; i0 < past_q; i0 += block_q) {
            const int64_t here = smaller(block_q, past_q - i0);
            add_tile(b, h, i0, here, j0, smaller(block_k, past - j0));
            pending += out.shape[2] == 1 ? here : 1;
            if (pending >= per_flush) flush(rows, columns);
          }
    }
    flush(rows, columns);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; total && j < columns; ++j)
        recent[i * block_k + j] = S(total[i * block_k + j]);
      write_row(bias_b, bias_h, tile_q * block_q + i, tile_k * block_k, columns,
                recent + i * block_k);
    }
  }

 private:
  // To an element of dbias, at most; what one row adds to its sum over the keys counts once.
  int64_t additions() const {
    const int64_t* const shape = out.shape;
    return (shape[0] == 1 ? f.sequences() : 1) * (shape[1] == 1 ? f.heads() : 1) *
           (shape[2] == 1 ? f.longest_q() : 1) *
           (shape[3] == 1 ? (f.longest_k() + block_k - 1) / block_k : 1);
  }

  void flush(int64_t rows, int64_t columns) {
    pending = 0;
    for (int64_t i = 0; total && i < rows; ++i)
      for (int64_t j = i * block_k; j < i * block_k + columns; ++j) {
        total[j] += double(recent[j]);
        recent[j] = 0;
      }
  }

  void add_tile(int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t j0, int64_t columns) {
    constexpr int w = width<S>;
    if (sequence.end(i0 + rows - 1) <= j0 || sequence.begin(i0) >= j0 + columns) return;
    if (!(scores.mask.of(b, h, i0, rows, j0, columns) & MaskMap::sees)) return;
    const int64_t first_q = sequence.query_row(i0), first_k = sequence.key_row(j0);
    const int64_t h_kv = h / f.group(), padded = round_up(rows, E::row_step);
    const int64_t wide = round_up(columns, 2 * w), panels = round_up(columns, E::panel);
    pack_rows<E>(source<T>(f.q, b, h, first_q), rows, d, padded, q);
    pack_rows<E>(source<T>(f.dout, b, h, first_q), f.dout ? rows : 0, dv, padded, o);
    pack_panels_transposed<E>(source<T>(f.k, b, h_kv, first_k), columns, d, panels, kt, strip);
    pack_panels_transposed<E>(source<T>(f.v, b, h_kv, first_k), columns, dv, panels, vt, strip);
    E::multiply(padded, wide, round_up(d, E::depth_step), q, kt, s, block_k, false);
    E::multiply(padded, wide, round_up(dv, E::depth_step), o, vt, dp, block_k, false);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t seen = larger(smaller(sequence.end(i0 + i) - j0, columns), 0);
      add_row(b, h, i0 + i, i, j0, seen);
    }
  }

  void add_row(int64_t b, int64_t h, int64_t i, int64_t local, int64_t j0, int64_t seen) {
    constexpr int w = width<S>;
    const int64_t row_q = sequence.query_row(i);
    const S lse = *f.lse.at<S>(b, h, row_q);
    if (lse == -infinity<S>) return;
    S* score = s + local * block_k;
    S* grad = dp + local * block_k;
    const S delta = delta_of(b, h, row_q);
    if (scores.dropout) {
      scores.keep(b, h, i, j0, seen, keep);
      for (int64_t j = 0; j < seen; j += w)
        store(grad + j,
              select_bytes<S>(keep + j, load(grad + j) * S(scores.dropout.factor), vec<S>{}));
    }
    scores.prepare(score, sequence, b, h, i, j0, seen, row);
    scores.mask.apply(score, b, h, i, j0, seen);
    scores.hide(score, smaller(sequence.begin(i) - j0, seen));
    scores.rebase(score, seen, lse);
    S* sum = recent + (out.shape[2] == 1 ? 0 : local * block_k);
    vec<S> of_row{};
    for (int64_t j = 0; j < seen; j += w) {
      const vec<S> p = exp2<E::exp2_degree>(load(score + j));
      vec<S> ds = select_below(int(seen - j), p * (load(grad + j) - delta), vec<S>{});
      if (slopes) ds *= -scores.distance(sequence, i, j0 + j);
      if (out.shape[3] == 1) {
        of_row += ds;
      } else {
        store(sum + j, load(sum + j) + ds);
      }
    }
    if (out.shape[3] == 1) sum[0] += reduce_add(of_row);
  }

  S delta_of(int64_t b, int64_t h, int64_t i) const {
    S delta = f.dlse ? -*f.dlse.at<S>(b, h, i) : S(0);
    if (f.dout) delta += dot(source<T>(f.dout, b, h, i), source<T>(f.out, b, h, i), dv);
    return delta;
  }

  void write_row(int64_t b, int64_t h, int64_t i, int64_t j, int64_t n, const S* sum) const {
    with_float_type<S>(out.dtype, [&]<class B>(B) {
      store_row(out.at<B>(b, h, i, j), out.stride[3], n, sum, S(1));
    });
  }
};

// out: of f.dbias, or where `slopes` of f.dalibi_slopes.
template <class E, class T>
static void attention_bias_grad(const AttentionBackward& f, const TensorView& out, bool slopes) {
  typedef BiasGradTask<E, T> Task;
  const int threads = threads_for(f, Lengths(f, [](int64_t) { return true; }));
  Scores<stat_of<E>> scores(f);
  Arena count;
  scores.mask.take(count);
  const size_t shared = count.used();
  const Task any(f, scores, out, slopes, count);
  const int64_t tiles_q = any.tiles_q(), tiles_k = any.tiles_k(), heads = out.shape[1];
  const int64_t tasks = out.shape[0] * heads * tiles_q * tiles_k;
  const Workspace workspace(shared, count.used() - shared, threads);
  Arena common = workspace.shared();
  scores.mask.take(common);
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const typename E::Scope scope;
    Arena arena = workspace.own(omp_get_thread_num());
    Task task(f, scores, out, slopes, arena);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < scores.mask.tasks(); ++i) scores.mask.run(i);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tasks; ++i) {
      const int64_t head = i / (tiles_q * tiles_k);
      task.run(head / heads, head % heads, i / tiles_k % tiles_q, i % tiles_k);
    }
  }
}

}  // namespace fusedattn::FUSEDATTN_ISA
