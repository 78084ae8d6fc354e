// Tiles of 16-bit elements in shared memory, and products of them by a warp.
//
// A row lies in 16-byte chunks of 8 elements. Eight lanes that access 16 bytes each at a time take
// one cycle where their chunks lie in different eighths of a 128-byte line of the banks. Lanes of
// ldmatrix read one column of chunks in eight rows, which without more would all lie in one eighth
// (widths of 64, 128, 192, 256) or in two (96): so the chunks of a row change places, by an
// exclusive or with a number that differs from row to row. Copies write a row's chunks in groups of
// eight, or of four in two rows, which stay conflict-free.
//
// The product c += a b of a warp, from tiles:
//
//   multiply<T, steps>(c, a, b)           c[m][n]: 16 m rows × 8 n columns, as fragments
//   OperandA<Tile, Sum::along>(tile, r)   a[i][s] = tile[r + i][s]   queries in q kᵀ
//   OperandA<Tile, Sum::across>(tile, r)  a[i][s] = tile[r + s][i]   dsᵀ in dsᵀ q
//   OperandB<Tile, Sum::along>(tile, r)   b[s][j] = tile[r + j][s]   keys in q kᵀ
//   OperandB<Tile, Sum::across>(tile, r)  b[s][j] = tile[r + s][j]   values in p v
//   HeldA<T, m, steps>                    a in registers: loaded once, or rounded from the c of a
//                                         product before (round)
#pragma once

#include "instructions.cuh"

namespace fusedattn::cuda {

constexpr int chunk_size = 8;  // elements of 16 bits in 16 bytes

// --- layout --------------------------------------------------------------------------------------

template <int rows_, int width_>
struct Tile {
  static constexpr int rows = rows_, width = width_;
  static constexpr int chunks = width / chunk_size;
  static constexpr int row_bytes = 2 * width;
  static constexpr int bytes = rows * row_bytes;
  // Chunks change places within groups of so many.
  static constexpr int group = chunks % 8 == 0 ? 8 : 4;
  static_assert(chunks % group == 0 && (group == 8 || chunks / group % 2 == 1));
  static_assert(rows % 16 == 0);

  char* data;  // aligned to 128 bytes

  // What is or-ed to the numbers of a row's chunks. In groups of four a row begins half a line
  // after the one before, so that pairs of rows are what is told apart.
  FUSEDATTN_DEVICE static int swizzle(int row) { return group == 8 ? row & 7 : row >> 1 & 3; }

  FUSEDATTN_DEVICE char* at(int row, int chunk) const {
    return data + row * row_bytes + (chunk ^ swizzle(row)) * 16;
  }
};

// --- between global and shared memory ------------------------------------------------------------

// A matrix in global memory: rows of unit stride, 16-byte aligned.
struct Rows {
  const void* data;
  int64_t stride;  // elements from row to row
};

// Begins to copy rows [first, first + Tile::rows) of a matrix to a tile, by threads 0 … threads
// - 1. Rows at and past `end` and columns at and past `width`, a multiple of 8, are zeros and not
// read.
template <int threads, class Tile>
FUSEDATTN_DEVICE void copy_tile(const Tile& tile, const Rows& matrix, int first, int end,
                                int width) {
  // Of `group` threads side by side each takes a chunk of one row, so that a warp reads whole lines
  // of memory; the others take the rows below.
  constexpr int rows = threads / Tile::group;
  static_assert(threads % Tile::group == 0 && rows % 8 == 0 && Tile::rows % rows == 0);
  // Addresses are worked out anew for each tile; they would fill the registers of the loop around.
  const int rank = anew(thread()), row = rank / Tile::group, chunk = rank % Tile::group;
  const uint16_t* from = static_cast<const uint16_t*>(matrix.data) + (first + row) * matrix.stride +
                         chunk * chunk_size;
  char* to = tile.at(row, chunk);
#pragma unroll
  for (int below = 0; below < Tile::rows; below += rows) {
    const bool row_exists = first + row + below < end;
#pragma unroll
    for (int c = 0; c < Tile::chunks; c += Tile::group)
      copy_async(to + below * Tile::row_bytes + c * 16, from + c * chunk_size,
                 row_exists && (chunk + c) * chunk_size < width);
    from += rows * matrix.stride;
  }
}

// Writes rows [row, row + rows) of a tile to rows [first, first + rows) of a matrix, by one warp;
// none at and past `end`, no columns at and past `width`.
template <int rows, class Tile>
FUSEDATTN_DEVICE void write_rows(const Tile& tile, int row, void* data, int64_t stride, int first,
                                 int end, int width) {
  constexpr int step = warp_size / Tile::group;
  const int mine = lane() / Tile::group, chunk = lane() % Tile::group;
  uint16_t* to = static_cast<uint16_t*>(data) + (first + mine) * stride + chunk * chunk_size;
#pragma unroll 4
  for (int r = mine; r < rows; r += step) {
    if (first + r < end)
#pragma unroll
      for (int c = 0; c < Tile::chunks; c += Tile::group)
        if ((chunk + c) * chunk_size < width)
          store(
              reinterpret_cast<Pack<uint32_t, 4>*>(to + c * chunk_size),
              load_shared(reinterpret_cast<const Pack<uint32_t, 4>*>(tile.at(row + r, chunk + c))));
    to += step * stride;
  }
}

// --- operands ------------------------------------------------------------------------------------

// Where the dimension that a product sums over runs in a tile: along its rows, or across them from
// row to row.
enum class Sum { along, across };

// What a lane gives to ldmatrix: one row of a 16 × 16 piece of a tile, in one of two orders of its
// four 8 × 8 matrices. `down`: upper left, lower left, upper right, lower right; else upper left,
// upper right, lower left, lower right.
template <class Tile, bool down>
class Pieces {
 public:
  // Pieces are counted from `row`, a multiple of 8.
  FUSEDATTN_DEVICE Pieces(const Tile& tile, int row) {
    // Of the widest tiles the addresses would fill the registers of a loop around the products.
    const unsigned i = unsigned(Tile::width > 192 ? anew(lane()) : lane());
    const int below = int(down ? i % 16 : i % 8 + i / 16 * 8);
    const int right = int(down ? i / 16 : i / 8 % 2);
    row_ = tile.data + (row + below) * Tile::row_bytes;
    swizzle_ = right ^ Tile::swizzle(below);
  }

  // The piece at row 16 i and column 16 j. Rows and upper bits of the column become part of an
  // address that is known when compiling; the three lower ones are or-ed to what the lane holds.
  FUSEDATTN_DEVICE const char* at(int i, int j) const {
    const int chunk = 2 * j;
    return row_ + i * 16 * Tile::row_bytes + (chunk & ~7) * 16 + ((chunk & 7) ^ swizzle_) * 16;
  }

 private:
  const char* row_;
  int swizzle_;
};

// The order of matrices in a piece follows from the fragments in instructions.cuh.
template <class Tile, Sum sum>
class OperandA {
 public:
  FUSEDATTN_DEVICE explicit OperandA(const Tile& tile, int row = 0) : pieces_(tile, row) {}

  // Rows 16 i … 16 i + 15 of a, summands 16 s … 16 s + 15.
  FUSEDATTN_DEVICE Pack<uint32_t, 4> fragment(int i, int s) const {
    if constexpr (sum == Sum::along)
      return load_matrices(pieces_.at(i, s));
    else
      return load_matrices_transposed(pieces_.at(s, i));
  }

 private:
  Pieces<Tile, sum == Sum::along> pieces_;
};

template <class Tile, Sum sum>
class OperandB {
 public:
  FUSEDATTN_DEVICE explicit OperandB(const Tile& tile, int row = 0) : pieces_(tile, row) {}

  // Columns 16 j … 16 j + 15 of b, summands 16 s … 16 s + 15: two fragments, of eight columns each.
  FUSEDATTN_DEVICE Pack<uint32_t, 4> fragment(int j, int s) const {
    if constexpr (sum == Sum::along)
      return load_matrices(pieces_.at(j, s));
    else
      return load_matrices_transposed(pieces_.at(s, j));
  }

 private:
  Pieces<Tile, sum == Sum::across> pieces_;
};

// An a in registers: 16 m rows, 16 · steps summands.
template <class T, int m, int steps>
struct HeldA {
  Pack<uint32_t, 4> fragments[m][steps];

  FUSEDATTN_DEVICE const Pack<uint32_t, 4>& fragment(int i, int s) const { return fragments[i][s]; }

  template <class A>
  FUSEDATTN_DEVICE void load(const A& a) {
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
      for (int s = 0; s < steps; ++s) fragments[i][s] = a.fragment(i, s);
  }

  // The columns of c are the summands: two of its fragments hold what one of a does, in the same
  // lanes.
  FUSEDATTN_DEVICE void round(const Pack<float, 4> (&c)[m][2 * steps]) {
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Pack<float, 4>& x = c[i][2 * s + half];
          fragments[i][s][2 * half] = pair<T>(x[0], x[1]);
          fragments[i][s][2 * half + 1] = pair<T>(x[2], x[3]);
        }
  }
};

// --- products ------------------------------------------------------------------------------------

template <int m, int n>
FUSEDATTN_DEVICE void clear(Pack<float, 4> (&c)[m][n]) {
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int j = 0; j < n; ++j) c[i][j] = {0.0f, 0.0f, 0.0f, 0.0f};
}

// c += a b over 16 · steps summands. A fragment of b serves all rows of c.
template <class T, int steps, int m, int n, class A, class B>
FUSEDATTN_DEVICE void multiply(Pack<float, 4> (&c)[m][n], const A& a, const B& b) {
  static_assert(n % 2 == 0);
#pragma unroll
  for (int s = 0; s < steps; ++s) {
    Pack<uint32_t, 4> rows[m];
#pragma unroll
    for (int i = 0; i < m; ++i) rows[i] = a.fragment(i, s);
#pragma unroll
    for (int j = 0; j < n / 2; ++j) {
      const Pack<uint32_t, 4> columns = b.fragment(j, s);
#pragma unroll
      for (int i = 0; i < m; ++i) {
        mma<T>(c[i][2 * j], rows[i], columns[0], columns[1]);
        mma<T>(c[i][2 * j + 1], rows[i], columns[2], columns[3]);
      }
    }
  }
}

// Where element e of a fragment of c lies: row of 16, column of 8.
FUSEDATTN_DEVICE int row_of(int e) { return lane() / 4 + e / 2 * 8; }
FUSEDATTN_DEVICE int column_of(int e) { return lane() % 4 * 2 + e % 2; }

// Rounds c, times `factor`, to rows [row, row + 16 m) of a tile, from chunk `chunk` on; its rows
// land in different eighths of the banks.
template <class T, int m, int n, class Tile>
FUSEDATTN_DEVICE void round_to(const Tile& tile, int row, int chunk,
                               const Pack<float, 4> (&c)[m][n], float factor = 1.0f) {
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 16 * i + row_of(2 * half);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const Pack<float, 4>& x = c[i][j];
        store_shared(reinterpret_cast<uint32_t*>(tile.at(r, chunk + j) + 2 * column_of(0)),
                     pair<T>(x[2 * half] * factor, x[2 * half + 1] * factor));
      }
    }
}

}  // namespace fusedattn::cuda
