// Rotary embedding: pairs (a, b) of the first R features become (a·cos − b·sin, b·cos + a·sin).
//
// A task is a block of rows. Their rows of cos and sin are gathered once, in the type that is
// computed in, and then serve every head of x and x2; x is read and written once. A row is read
// before it is written, vector by vector, so that `out` may be x.
#include "rotary.h"

#include "dtypes.h"
#include "positions.h"
#include "workspace.h"

namespace fusedattn::FUSEDATTN_ISA {

template <class T, bool Interleaved>
class RotaryTask {
  typedef compute_t<T> S;
  // Bytes of gathered tables that stay in the first-level cache beside x.
  static constexpr int64_t table_bytes = 16 << 10;

  const Rotary& f;
  const Positions positions;
  const int64_t half, columns;  // pairs, and columns of a gathered table
  S *cos, *sin, *row;
  int64_t loaded_b = -1, loaded_i = -1;

 public:
  // Interleaved tables repeat each number for the two features of its pair.
  RotaryTask(const Rotary& f, Arena& arena)
      : f(f),
        positions(f.positions, f.offset, f.options.offset),
        half(f.cos.shape[2]),
        columns(Interleaved ? 2 * half : half) {
    cos = arena.take<S>(most_rows(f) * columns);
    sin = arena.take<S>(most_rows(f) * columns);
    row = arena.take<S>(2 * half);
  }

  static int64_t most_rows(const Rotary& f) {
    const int64_t row_bytes = 2 * f.cos.shape[2] * int64_t(sizeof(S)) * (Interleaved ? 2 : 1);
    return row_bytes < table_bytes ? table_bytes / row_bytes : 1;
  }

  bool shared() const { return f.cos.stride[0] == 0 && positions.shared(); }

  // Rows i … i_end of batch b, the heads h … h_end of x and then x2.
  void run(int64_t b, int64_t i, int64_t i_end, int64_t h, int64_t h_end) {
    if (loaded_i != i || (loaded_b != b && !shared())) gather(b, i, i_end);
    loaded_b = b, loaded_i = i;
    const int64_t heads = f.x.shape[1];
    if (h < heads) rotate(f.x, f.out, b, i, i_end, h, h_end < heads ? h_end : heads);
    if (h_end > heads) {
      const int64_t first = h > heads ? h - heads : 0;
      rotate(f.x2, f.out2, b, i, i_end, first, h_end - heads);
    }
  }

 private:
  void gather(int64_t b, int64_t i, int64_t i_end) {
    switch (f.cos.dtype) {
      case DType::f16:
        return gather_from<f16>(b, i, i_end);
      case DType::bf16:
        return gather_from<bf16>(b, i, i_end);
      case DType::f32:
        return gather_from<float>(b, i, i_end);
      default:
        return gather_from<double>(b, i, i_end);
    }
  }

  template <class From>
  void gather_from(int64_t b, int64_t i, int64_t i_end) {
    const S sign = f.options.inverse ? S(-1) : S(1);
    S *c = cos, *s = sin;
    for (; i < i_end; ++i, c += columns, s += columns) {
      const int64_t position = positions.at(b, i);
      if (position < 0 || position >= f.cos.shape[1]) {
        // No memory outside the tables is read, and the missing angle shows.
        for (int64_t j = 0; j < columns; ++j) c[j] = s[j] = __builtin_nan("");
        continue;
      }
      gather_row(f.cos.at<From>(b, position, 0), f.cos.stride[2], S(1), S(1), c);
      gather_row(f.sin.at<From>(b, position, 0), f.sin.stride[2], -sign, sign, s);
    }
  }

  // A row of a table as S, times `second`; interleaved each number twice, first times `first`.
  template <class From>
  void gather_row(const From* from, int64_t step, S first, S second, S* to) const {
    constexpr int w = width<S>;
    int64_t j = 0;
    if (step == 1) {
      ints<S> odd, low;
      for (int lane = 0; lane < w; ++lane) odd[lane] = lane % 2, low[lane] = lane / 2;
      const vec<S> factor = odd != 0 ? splat(second) : splat(first);
      for (; j + w <= half; j += w) {
        const vec<S> x = get<S>(from + j, Whole{});
        if constexpr (Interleaved) {
          store(to + 2 * j, __builtin_shuffle(x, low) * factor);
          store(to + 2 * j + w, __builtin_shuffle(x, low + w / 2) * factor);
        } else {
          store(to + j, x * second);
        }
      }
    }
    for (; j < half; ++j) {
      const S x = S(to_float(from[j * step]));
      if constexpr (Interleaved)
        to[2 * j] = first * x, to[2 * j + 1] = second * x;
      else
        to[j] = second * x;
    }
  }

  // Heads that lie apart are taken four at a time, so that a row of the tables is read once for
  // them; heads that lie side by side all at once.
  void rotate(const TensorView& x, const TensorView& out, int64_t b, int64_t i, int64_t i_end,
              int64_t h, int64_t h_end) {
    const int64_t most = x.stride[2] <= x.stride[1] ? 4 : h_end;
    const int64_t rest = x.data == out.data ? 0 : x.shape[3] - 2 * half;
    for (; h < h_end; h += most) {
      const int64_t heads = h + most < h_end ? most : h_end - h;
      const Block block = {i_end - i,   x.stride[2],   out.stride[2], heads,
                           x.stride[1], out.stride[1], rest};
      rotate_block(x.at<T>(b, h, i), x.stride[3], out.at<T>(b, h, i), out.stride[3], block);
    }
  }

  // Rows and heads, how far apart they lie in x and in out, and how many features are copied.
  struct Block {
    int64_t rows, x_row, out_row, heads, x_head, out_head, rest;
  };

  void rotate_block(const T* from, int64_t step, T* to, int64_t out_step,
                    const Block& block) const {
    if (step != 1 || out_step != 1) return turn_strided(from, step, to, out_step, block);
    switch (columns % width<S> ? 0 : columns / width<S>) {
      case 1:
        return turn_block<1>(from, to, block);
      case 2:
        return turn_block<2>(from, to, block);
      case 4:
        return turn_block<4>(from, to, block);
      default:
        return turn_block<0>(from, to, block);
    }
  }

  // `Vectors` make up a row of the table, and stay in registers; 0: any number of columns.
  template <int Vectors>
  void turn_block(const T* from, T* to, const Block& block) const {
    const S *c = cos, *s = sin;
    for (int64_t r = 0; r < block.rows; ++r, c += columns, s += columns) {
      const T* x = from + r * block.x_row;
      T* out = to + r * block.out_row;
      if constexpr (Vectors > 0) {
        vec<S> row_cos[Vectors], row_sin[Vectors];
        for (int k = 0; k < Vectors; ++k) {
          row_cos[k] = load(c + k * width<S>);
          row_sin[k] = load(s + k * width<S>);
        }
        for (int64_t h = 0; h < block.heads; ++h, x += block.x_head, out += block.out_head) {
          turn_vectors<Vectors>(x, out, row_cos, row_sin);
          copy_rest(x, 1, out, 1, block.rest);
        }
      } else {
        for (int64_t h = 0; h < block.heads; ++h, x += block.x_head, out += block.out_head) {
          turn(x, out, c, s);
          copy_rest(x, 1, out, 1, block.rest);
        }
      }
    }
  }

  void turn_strided(const T* from, int64_t step, T* to, int64_t out_step,
                    const Block& block) const {
    for (int64_t r = 0; r < block.rows; ++r) {
      for (int64_t h = 0; h < block.heads; ++h) {
        const T* x = from + r * block.x_row + h * block.x_head;
        T* out = to + r * block.out_row + h * block.out_head;
        load_row(x, step, 2 * half, row, 2 * half);
        turn(row, row, cos + r * columns, sin + r * columns);
        store_row(out, out_step, 2 * half, row, S(1));
        copy_rest(x, step, out, out_step, block.rest);
      }
    }
  }

  // The features that are not turned.
  void copy_rest(const T* x, int64_t step, T* out, int64_t out_step, int64_t count) const {
    if (count == 0) return;
    x += 2 * half * step, out += 2 * half * out_step;
    if (step == 1 && out_step == 1) {
      memcpy(static_cast<void*>(out), x, count * sizeof(T));
      return;
    }
    for (int64_t j = 0; j < count; ++j) out[j * out_step] = x[j * step];
  }

  FUSEDATTN_MEMBER static vec<S> swap_neighbours(vec<S> x) {
    ints<S> neighbour;
    for (int lane = 0; lane < width<S>; ++lane) neighbour[lane] = lane ^ 1;
    return __builtin_shuffle(x, neighbour);
  }

  // All is read before anything is written, and whole cache lines are written one after the other.
  template <int Vectors>
  FUSEDATTN_MEMBER static void turn_vectors(const T* x, T* out, const vec<S>* c, const vec<S>* s) {
    if constexpr (Interleaved) {
      for (int k = 0; k < Vectors; ++k) {
        const vec<S> each = load_as(x + k * width<S>);
        store_as(out + k * width<S>, each * c[k] + swap_neighbours(each) * s[k]);
      }
    } else {
      const int n = Vectors * width<S>;
      vec<S> a[Vectors], b[Vectors];
      for (int k = 0; k < Vectors; ++k) {
        const vec<S> first = load_as(x + k * width<S>), second = load_as(x + n + k * width<S>);
        a[k] = first * c[k] - second * s[k];
        b[k] = second * c[k] + first * s[k];
      }
      for (int k = 0; k < Vectors; ++k) store_as(out + k * width<S>, a[k]);
      for (int k = 0; k < Vectors; ++k) store_as(out + n + k * width<S>, b[k]);
    }
  }

  template <class U>
  FUSEDATTN_MEMBER void turn(const U* x, U* out, const S* c, const S* s) const {
    const int64_t n = columns;
    int64_t j = 0;
    if constexpr (Interleaved) {
      for (; j + width<S> <= n; j += width<S>) {
        const vec<S> each = load_as(x + j);
        store_as(out + j, each * load(c + j) + swap_neighbours(each) * load(s + j));
      }
      if (const Some tail{int(n - j)}; tail.n > 0) {
        const vec<S> each = get<S>(x + j, tail);
        set<S>(out + j, each * get<S>(c + j, tail) + swap_neighbours(each) * get<S>(s + j, tail),
               tail);
      }
    } else {
      for (; j + width<S> <= n; j += width<S>) {
        const vec<S> a = load_as(x + j), b = load_as(x + n + j);
        const vec<S> cj = load(c + j), sj = load(s + j);
        store_as(out + j, a * cj - b * sj);
        store_as(out + n + j, b * cj + a * sj);
      }
      if (const Some tail{int(n - j)}; tail.n > 0) {
        const vec<S> a = get<S>(x + j, tail), b = get<S>(x + n + j, tail);
        const vec<S> cj = get<S>(c + j, tail), sj = get<S>(s + j, tail);
        set<S>(out + j, a * cj - b * sj, tail);
        set<S>(out + n + j, b * cj + a * sj, tail);
      }
    }
  }
};

template <class T, bool Interleaved>
static bool rotate_all(const Rotary& f) {
  typedef RotaryTask<T, Interleaved> Task;
  const int64_t batch = f.x.shape[0], length = f.x.shape[2];
  const int64_t heads = f.x.shape[1] + (f.x2 ? f.x2.shape[1] : 0);
  const int threads = threads_for_elements(f.work());
  // Rows of a task: as many as have room, but not so many that threads stay without one.
  const int64_t share = length * batch / (4 * threads);
  int64_t rows = Task::most_rows(f);
  rows = rows < share ? rows : share > 0 ? share : 1;
  rows = rows < length ? rows : length;
  const int64_t blocks = (length + rows - 1) / rows;
  // A few long rows, in decoding, split their heads.
  const int64_t parts = blocks * batch < threads ? (heads < threads ? heads : threads) : 1;
  const int64_t tasks = blocks * batch * parts;

  Arena count;
  Task(f, count);
  const Workspace workspace(0, count.used(), threads);
  on_threads(threads, [&] {
    const int own = omp_get_thread_num(), all = omp_get_num_threads();
    Arena arena = workspace.own(own);
    Task task(f, arena);
    const bool shared = task.shared();
    for (int64_t t = tasks * own / all; t < tasks * (own + 1) / all; ++t) {
      const int64_t part = t % parts, at = t / parts;
      // Batches that share their tables follow each other.
      const int64_t b = shared ? at % batch : at / blocks;
      const int64_t i = (shared ? at / batch : at % blocks) * rows;
      const int64_t i_end = i + rows < length ? i + rows : length;
      task.run(b, i, i_end, heads * part / parts, heads * (part + 1) / parts);
    }
  });
  return true;
}

template <class T>
static bool rotary(const Rotary& f) {
  return f.options.interleaved ? rotate_all<T, true>(f) : rotate_all<T, false>(f);
}

RotaryKernels rotary_kernels() {
  return by_dtype<RotaryKernels>([]<class T>(RotaryKernels& kernels, DType dtype) {
    kernel_for<Rotary>(kernels, dtype) = {rotary<T>};
  });
}

}  // namespace fusedattn::FUSEDATTN_ISA
