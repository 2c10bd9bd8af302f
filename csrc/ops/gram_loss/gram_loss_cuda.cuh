// What the kernels of gram_loss share: numbers, workspace, names.
//
// Four kernels, the first three once per chunk of images:
//   pack      features -> 16-bit numbers on rows scaled by a power of two, and the rows' inverse norms
//   tiles     products of rows on lower-triangular tiles, both tensors; loss; F; row sums for t
//   gradient  F times the packed features, and the epilogue with t
//   sum       the tiles' losses, in the order of their index
//
// Numbers. Row i is scaled to x'[i] = 2^k[i] x[i] with 2^14 <= |x'[i]| < 2^15 (exact) and written as fp16: bf16 and
// fp16 features fit in one number, fp32 features in two, x' = high + low with an error below 2^-22 |x'|. Of the
// products three are taken, high high + high low + low high. Splitting into bf16 pairs without scaling costs the same
// and loses 60 times more: it breaks the accuracy rule by 10 to 100 (counted against float64). Products are summed raw
// in fp32; norms, clips and differences come after.
//
// The gradient needs D[i, j] r[j] for rows i of a tile and D[i, j] r[i] for its mirror image. With u[i] = 2^14 /
// |x'[i]|, 1/2 < u <= 1, both follow from one symmetric F[i, j] = 2^14 u[i] u[j] D[i, j]:
//   sum over j of D[i, j] r[j] x[j] = 2^-28 / u[i] sum over j of F[i, j] x'[j]
// so that F is stored once per pair, as x' is in one or two fp16 numbers, and read along rows or columns: N^2 bytes per
// image and part. u[i] cancels against the r[i] in front.
#pragma once

#include "core/launch.cuh"
#include "core/tile.cuh"
#include "ops/gram_loss/gram_loss_plan.h"

namespace dinov3_ext {

inline constexpr Element kGramElement = Element::float16;  // of packed features and of F
inline constexpr int kGramDepth = 32;                      // products per step of a tile's loop

// Per-row numbers; a row's are `patches` apart.
enum GramRow : int {
  kStudentInverse,  // 1 / |x'|
  kStudentSelf,     // S[i, i]: 1, or for a short row (|x| / 1e-12)^2
  kStudentAlong,    // 2^14 u^2, which t x' is multiplied by; 0 for a short row
  kStudentScale,    // 2^(k - 42)
  kTeacherInverse,
  kTeacherSelf,
};

// One chunk of images.
struct GramWork {
  int patches, width, packed_width, blocks, tiles;  // not int64: half the registers; offsets begin with an int64
  uint16_t* student;                                // packed: (images, parts, patches, packed_width)
  uint16_t* teacher;
  float* rows;        // (images, kGramRowFields, patches)
  float* losses;      // (images, tiles)
  float* along;       // (images, blocks, blocks tile): sums over the columns of tile column b of D'[i, j] S[i, j]
  uint16_t* entries;  // F: (images, tiles, parts, tile, tile); null: no gradient
  float lowest_student, lowest_teacher;  // what clips to zero lies below: 0, or -inf for no clip
  void* grad;                            // (images, patches, width), or null
  bool grad_is_bfloat16;                 // else fp32
  float coefficient;                     // 4 / (images patches^2) of the whole batch
};

// Thread layout of a tile: warps of Rows x 32.
template <int Tile>
struct GramTile {
  static_assert(Tile == 64 || Tile == 128);
  static constexpr int kThreads = Tile == 128 ? 256 : 128;
  static constexpr int kWarpRows = Tile == 128 ? 64 : 32;
  static constexpr int kWarpColumns = 32;
  static constexpr int kDown = Tile / kWarpRows, kAcross = Tile / kWarpColumns;  // warps
  static constexpr int MT = kWarpRows / 16, NT = kWarpColumns / 8;
  static __device__ __forceinline__ int row() { return warp_index() % kDown * kWarpRows; }
  static __device__ __forceinline__ int column() { return warp_index() / kDown * kWarpColumns; }
};

// sums += the products of one 16-row operand. Parts 2: `a`, `b` are the high and low parts of 16 terms, Parts 1: two
// times 16 terms. They are added up by themselves, then to `sums`: one rounding at the size of the whole sum per 16 or
// 32 terms, and it is one to nearest, where a tensor core cuts off. Against float64 in the emulator, 300 x 1024, fp32:
// the gradient loses 5 times more with everything in one sum, and more than the accuracy rule allows. Costs one
// addition per accumulator, in issue slots that the tensor cores leave free.
template <int Parts, int NT>
__device__ __forceinline__ void add_products(float (&sums)[NT][4], const uint32_t (&a)[2][4],
                                             const uint32_t (&b)[2][NT / 2][4]) {
  float fresh[NT][4] = {};
  if constexpr (Parts == 2) {
    product_of_operands<kGramElement>(fresh, a[1], b[0]);
    product_of_operands<kGramElement>(fresh, a[0], b[1]);
    product_of_operands<kGramElement>(fresh, a[0], b[0]);
  } else {
    product_of_operands<kGramElement>(fresh, a[0], b[0]);
    product_of_operands<kGramElement>(fresh, a[1], b[1]);
  }
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int q = 0; q < 4; ++q) sums[n][q] += fresh[n][q];
  }
}

__device__ __forceinline__ int triangle(int n) { return int(int64_t(n) * (n + 1) / 2); }

// Row and column of tile `index` >= 0 of a lower triangle, row by row: the row's bits one after another, in integers,
// so that a static verifier can follow it. Rows stay below 2^15 (kGramMostPatches / 128).
__device__ __forceinline__ void triangle_place(int index, int& row, int& column) {
  row = 0;
  column = index;
#pragma unroll 1  // and the column with the row: else the larger tile with two parts spills 4 bytes on sm_120
  for (int bit = 1 << 15; bit; bit >>= 1) {
    const int other = index - triangle(row + bit);
    if (other >= 0) row += bit, column = other;
  }
}

}  // namespace dinov3_ext
