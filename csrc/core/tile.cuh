// Tiles of 16-bit elements in shared memory, and warp-wide products with them.
//
// A tile's rows are cut into chunks of 16 bytes whose place within the row is permuted by the row number (xor), so that
// the eight rows of one 8 x 8 matrix lie in different banks: load_matrices and 16-byte accesses along rows or columns
// meet no bank conflict (counted by the emulator).
//
// In the emulator the products below run as one step of the whole warp (the same addresses, matrix loads and products,
// without a switch of fibers between them); tests/emulator compares that with the code as it stands here.
#pragma once

#include "core/primitives.cuh"

namespace dinov3_ext {

// Columns: 16-bit elements in a row, 32 or a multiple of 64. `base`: shared address, a multiple of 128.
template <int Columns>
struct Tile {
  static_assert(Columns == 32 || Columns % 64 == 0);
  static constexpr int kRowBytes = 2 * Columns;
  static constexpr int kChunks = Columns / 8;

  uint32_t base;

  // Address of the 16-byte chunk `chunk` of row `row`. One xor behind everything else: addresses of one lane that
  // differ in a constant column then share their registers (up to 40 fewer in kernels with many products).
  __device__ __forceinline__ uint32_t address(int row, int chunk) const {
    const int swizzle = Columns == 32 ? (row >> 1) & 3 : row & 7;
    return ((base + uint32_t(row * kRowBytes + (swizzle << 4))) ^ uint32_t((chunk & 7) << 4)) +
           uint32_t((chunk & ~7) << 4);
  }
  // Address of one element: for accesses of 2 or 4 bytes.
  __device__ __forceinline__ uint32_t element(int row, int column) const {
    return address(row, column >> 3) + uint32_t((column & 7) * 2);
  }
};

// Starts copying `Rows` rows of a tile, `Columns` elements each, from global memory by all `Threads` threads of the
// block; rows from `valid_rows` on become zero. from: element (0, 0), a multiple of 16 bytes like every row;
// row_stride in elements. Ends no group.
template <int Rows, int Threads, int Columns>
__device__ __forceinline__ void copy_tile_async(Tile<Columns> to, const uint16_t* from, int64_t row_stride,
                                                int valid_rows) {
  constexpr int kChunks = Tile<Columns>::kChunks;
  static_assert(Rows * kChunks % Threads == 0);
#pragma unroll
  for (int i = 0; i < Rows * kChunks / Threads; ++i) {
    const int index = i * Threads + thread_index(), row = index / kChunks, chunk = index % kChunks;
    const bool valid = row < valid_rows;
    copy_async(to.address(row, chunk), from + (valid ? row * row_stride + chunk * 8 : 0), valid);
  }
}

// ---- addresses of the matrix loads: what lane `lane` passes
// ---------------------------------------------------------------

// Rows row .. row + 15, columns column .. column + 15 as a left operand (row-major).
template <int Columns>
__device__ __forceinline__ uint32_t left_address(Tile<Columns> tile, int row, int column, int lane) {
  return tile.address(row + (lane & 15), (column >> 3) ^ (lane >> 4));
}
// The same 16 x 16 elements as the transpose of a left operand: products run along the tile's rows.
template <int Columns>
__device__ __forceinline__ uint32_t left_address_transposed(Tile<Columns> tile, int row, int column, int lane) {
  return tile.address(row + (lane & 7) + ((lane >> 4) << 3), (column >> 3) ^ ((lane >> 3) & 1));
}
// Two right operands b0, b1 | b0, b1: outputs along rows row .. row + 15, products along columns column .. column + 15.
template <int Columns>
__device__ __forceinline__ uint32_t right_address_rows(Tile<Columns> tile, int row, int column, int lane) {
  return tile.address(row + (lane & 7) + ((lane >> 4) << 3), (column >> 3) ^ ((lane >> 3) & 1));
}
// Two right operands: products along rows row .. row + 15, outputs along columns column .. column + 15 (transposed
// load).
template <int Columns>
__device__ __forceinline__ uint32_t right_address_columns(Tile<Columns> tile, int row, int column, int lane) {
  return tile.address(row + (lane & 15), (column >> 3) ^ (lane >> 4));
}

// ---- fragments and products: called by all lanes of a warp
// -----------------------------------------------------------------

// a[m][k]: the 16 x 16 elements at (row + 16 m, column + 16 k), as left operands.
template <int MT, int KT, int Columns>
__device__ __forceinline__ void load_left(uint32_t (&a)[MT][KT][4], Tile<Columns> tile, int row, int column) {
#if defined(DINOV3_EXT_EMULATOR)
  if (emulator::whole_tiles()) return emulator::load_left(a, tile, row, column);
#endif
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int k = 0; k < KT; ++k) {
      load_matrices(a[m][k], left_address(tile, row + 16 * m, column + 16 * k, lane_index()));
    }
  }
}

// a[m][k]: the transpose of the 16 x 16 elements at (row + 16 k, column + 16 m), as left operands: products run along
// the tile's rows.
template <int MT, int KT, int Columns>
__device__ __forceinline__ void load_left_transposed(uint32_t (&a)[MT][KT][4], Tile<Columns> tile, int row,
                                                     int column) {
#if defined(DINOV3_EXT_EMULATOR)
  if (emulator::whole_tiles()) return emulator::load_left_transposed(a, tile, row, column);
#endif
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int k = 0; k < KT; ++k) {
      load_matrices_transposed(a[m][k], left_address_transposed(tile, row + 16 * k, column + 16 * m, lane_index()));
    }
  }
}

// b[n / 2]: right operands b0, b1 | b0, b1 of the 8 NT rows from `row` on and the columns column .. column + 15:
// outputs n run along the tile's rows. For operands that several products use.
template <int NT, int Columns>
__device__ __forceinline__ void load_right_rows(uint32_t (&b)[NT / 2][4], Tile<Columns> tile, int row, int column) {
#if defined(DINOV3_EXT_EMULATOR)
  if (emulator::whole_tiles()) return emulator::load_right_rows<NT>(b, tile, row, column);
#endif
  const uint32_t first = right_address_rows(tile, row, column, lane_index());
#pragma unroll
  for (int n = 0; n < NT; n += 2) load_matrices(b[n / 2], first + uint32_t(8 * n * Tile<Columns>::kRowBytes));
}

// The same of the rows row .. row + 15 and the 8 NT columns from `column` on: outputs n run along the tile's columns.
template <int NT, int Columns>
__device__ __forceinline__ void load_right_columns(uint32_t (&b)[NT / 2][4], Tile<Columns> tile, int row, int column) {
#if defined(DINOV3_EXT_EMULATOR)
  if (emulator::whole_tiles()) return emulator::load_right_columns<NT>(b, tile, row, column);
#endif
#pragma unroll
  for (int n = 0; n < NT; n += 2) {
    load_matrices_transposed(b[n / 2], right_address_columns(tile, row, column + 8 * n, lane_index()));
  }
}

// d[n] += a b[n] of operands held in registers.
template <Element E, int NT>
__device__ __forceinline__ void product_of_operands(float (&d)[NT][4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[NT / 2][4]) {
#if defined(DINOV3_EXT_EMULATOR)
  if (emulator::whole_tiles()) return emulator::product_of_operands<E>(d, a, b);
#endif
#pragma unroll
  for (int n = 0; n < NT; n += 2) {
    multiply_add<E>(d[n], a, b[n / 2][0], b[n / 2][1]);
    multiply_add<E>(d[n + 1], a, b[n / 2][2], b[n / 2][3]);
  }
}

// d[m][n] += sum over k of a[m][k] B^T, where B is the 8 NT x 16 KT part of the tile at (row, column): outputs n run
// along the tile's rows. (Scores: queries in `a`, keys in the tile.)
template <Element E, int MT, int NT, int KT, int Columns>
__device__ __forceinline__ void product_with_rows(float (&d)[MT][NT][4], const uint32_t (&a)[MT][KT][4],
                                                  Tile<Columns> tile, int row, int column) {
  static_assert(NT % 2 == 0);
#if defined(DINOV3_EXT_EMULATOR)
  if (emulator::whole_tiles()) return emulator::product_with_rows<E>(d, a, tile, row, column);
#endif
#pragma unroll
  for (int k = 0; k < KT; ++k) {
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t b[4];
      load_matrices(b, right_address_rows(tile, row + 8 * n, column + 16 * k, lane_index()));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        multiply_add<E>(d[m][n], a[m][k], b[0], b[1]);
        multiply_add<E>(d[m][n + 1], a[m][k], b[2], b[3]);
      }
    }
  }
}

// d[m][n] += sum over k of a[m][k] B, where B is the 16 KT x 8 NT part of the tile at (row, column): outputs n run
// along the tile's columns. (Weighted values: probabilities in `a`, values in the tile.)
template <Element E, int MT, int NT, int KT, int Columns>
__device__ __forceinline__ void product_with_columns(float (&d)[MT][NT][4], const uint32_t (&a)[MT][KT][4],
                                                     Tile<Columns> tile, int row, int column) {
  static_assert(NT % 2 == 0);
#if defined(DINOV3_EXT_EMULATOR)
  if (emulator::whole_tiles()) return emulator::product_with_columns<E>(d, a, tile, row, column);
#endif
#pragma unroll
  for (int k = 0; k < KT; ++k) {
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, right_address_columns(tile, row + 16 * k, column + 8 * n, lane_index()));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        multiply_add<E>(d[m][n], a[m][k], b[0], b[1]);
        multiply_add<E>(d[m][n + 1], a[m][k], b[2], b[3]);
      }
    }
  }
}

// ---- accumulators: element (row, column) of d[n][q] within the 16 x 8 NT result
// -------------------------------------------

// Row of d[.][q] for this lane: q 0, 1 -> lane / 4, q 2, 3 -> lane / 4 + 8.
__device__ __forceinline__ int accumulator_row(int q) { return (lane_index() >> 2) + 8 * (q >> 1); }
// Column of d[n][q].
__device__ __forceinline__ int accumulator_column(int n, int q) { return 8 * n + 2 * (lane_index() & 3) + (q & 1); }

// Accumulators of 16 x 16 KT, rounded, as left operands of the next product: the layouts agree, nothing moves.
template <Element E, int KT>
__device__ __forceinline__ void round_to_left(uint32_t (&a)[KT][4], const float (&d)[2 * KT][4]) {
#pragma unroll
  for (int k = 0; k < KT; ++k) {
    a[k][0] = pack<E>(d[2 * k][0], d[2 * k][1]);
    a[k][1] = pack<E>(d[2 * k][2], d[2 * k][3]);
    a[k][2] = pack<E>(d[2 * k + 1][0], d[2 * k + 1][1]);
    a[k][3] = pack<E>(d[2 * k + 1][2], d[2 * k + 1][3]);
  }
}

}  // namespace dinov3_ext
