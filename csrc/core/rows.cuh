// Rows of 16-bit elements between global memory and the fragments of tensor-core products, without shared memory.
//
// Four neighbouring lanes (a quad) hold one row of a fragment, two elements each of every 8. In global memory each lane
// reads or writes 16 bytes, so that a quad moves 64 neighbouring bytes (two whole 32-byte sectors); a 4 x 4 transpose
// of words within the quad, four shuffles, leads from one to the other. A staging tile in shared memory would cost as
// many instructions, two trips through shared memory, and the memory of another block.
#pragma once

#include "core/primitives.cuh"

namespace dinov3_ext {

// Word i of lane t of each quad <-> word t of lane i. Called by all lanes of the warp.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4]) {
  const bool odd = lane_index() & 1, upper = lane_index() & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = shuffle_xor(odd ? word[i] : word[i + 1], 1);
    word[i] = odd ? other : word[i], word[i + 1] = odd ? word[i + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = shuffle_xor(upper ? word[i] : word[i + 2], 2);
    word[i] = upper ? other : word[i], word[i + 2] = upper ? word[i + 2] : other;
  }
}

// a[m][k]: 16 MT rows of 16 KT elements as left operands; rows from `valid_rows` on become zero and are not read.
// from: element (0, 0), row_stride in elements, both multiples of 16 bytes. KT even.
template <int MT, int KT>
__device__ __forceinline__ void load_left_rows(uint32_t (&a)[MT][KT][4], const uint16_t* from, int64_t row_stride,
                                               int valid_rows) {
  static_assert(KT % 2 == 0);
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * m + 8 * half + (lane_index() >> 2);
#pragma unroll
      for (int k = 0; k < KT; k += 2) {
        uint4 bits{0, 0, 0, 0};
        if (row < valid_rows) {
          bits = load_global(reinterpret_cast<const uint4*>(from + row * row_stride + 16 * k + 8 * (lane_index() & 3)));
        }
        uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
        transpose_quad(word);
        a[m][k][half] = word[0], a[m][k][2 + half] = word[1];
        a[m][k + 1][half] = word[2], a[m][k + 1][2 + half] = word[3];
      }
    }
  }
}

// The first `valid_rows` of 16 rows of 8 NT accumulators, each row times its factor (of rows lane / 4 and lane / 4 + 8)
// and rounded. NT a multiple of 4; the rest as above.
template <Element E, int NT>
__device__ __forceinline__ void store_accumulator_rows(uint16_t* to, int64_t row_stride, int valid_rows,
                                                       const float (&d)[NT][4], const float (&factor)[2]) {
  static_assert(NT % 4 == 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + (lane_index() >> 2);
#pragma unroll
    for (int n = 0; n < NT; n += 4) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        word[i] = pack<E>(d[n + i][2 * half] * factor[half], d[n + i][2 * half + 1] * factor[half]);
      }
      transpose_quad(word);
      if (row < valid_rows) {
        store_global(reinterpret_cast<uint4*>(to + row * row_stride + 8 * n + 8 * (lane_index() & 3)),
                     uint4{word[0], word[1], word[2], word[3]});
      }
    }
  }
}

}  // namespace dinov3_ext
