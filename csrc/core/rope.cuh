// Axial rotary positions on the device: which rows of the table a token reads, and the rotation of what a kernel holds:
// left operands in registers, accumulators in registers, pairs of 16-byte chunks.
//
// The table is (rows, 2, E/4) fp32, cosines then sines. Component e < E/4 takes the y-row of the token, the next E/4
// its x-row; the pair is (e, e + E/2). Both halves of a pair lie in the same lane and register of fragments E/2 columns
// apart, so nothing moves between lanes. Everything is fp32, rounded once.
#pragma once

#include "core/primitives.cuh"

namespace dinov3_ext {

// How a sequence's patches lie in the table of rotary rows.
struct RopeGrid {
  int prefix, y_row, x_row, width;
  float inverse_width;
};

// sequences: (S, 6) int32: first token, tokens, prefix length, first y-row, first x-row, grid width.
__device__ __forceinline__ RopeGrid load_rope_grid(const int32_t* sequences, int64_t sequence) {
  const int32_t* row = sequences + sequence * 6;
  const int width = load_global(row + 5);
  RopeGrid grid{load_global(row + 2), load_global(row + 3), load_global(row + 4), width < 1 ? 1 : width, 0.f};
  grid.inverse_width = reciprocal(float(grid.width));
  return grid;
}

// The two rows of the table that a token reads; y < 0: it is not turned.
struct RopeRows {
  int y, x;
};

// Token `token` of a sequence of `tokens` < 2^21 tokens; tokens behind the end are not turned. The division: estimate
// in floats (off by at most one below 2^21), then corrected: six instructions where an integer division takes twenty.
__device__ __forceinline__ RopeRows rope_rows(const RopeGrid& grid, int token, int tokens) {
  const int patch = token - grid.prefix;
  int line = int(float(patch) * grid.inverse_width);
  int column = patch - line * grid.width;
  if (column < 0) line -= 1, column += grid.width;
  if (column >= grid.width) line += 1, column -= grid.width;
  const bool turned = patch >= 0 && token < tokens;
  return {turned ? grid.y_row + line : -1, turned ? grid.x_row + column : -1};
}

// N angles of one token, components first .. first + N - 1 of E/2, all within one half of them (quarter = E/4): cosine
// and sine. N = 1, 2 or a multiple of 4; N > 1: `first` and `quarter` are multiples of N.
template <int N>
__device__ __forceinline__ void load_angles(float (&cosine)[N], float (&sine)[N], const float* rope, RopeRows rows,
                                            int first, int quarter) {
  static_assert(N <= 2 || N % 4 == 0);
  if (rows.y < 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) cosine[i] = 1.f, sine[i] = 0.f;
    return;
  }
  const bool vertical = first < quarter;
  const float* from = rope + int64_t(vertical ? rows.y : rows.x) * (2 * quarter) + (vertical ? first : first - quarter);
  if constexpr (N == 1) {
    cosine[0] = load_global(from), sine[0] = load_global(from + quarter);
  } else if constexpr (N == 2) {
    const float2 c = load_global(reinterpret_cast<const float2*>(from));
    const float2 s = load_global(reinterpret_cast<const float2*>(from + quarter));
    cosine[0] = c.x, cosine[1] = c.y, sine[0] = s.x, sine[1] = s.y;
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 c = load_global(reinterpret_cast<const float4*>(from + i));
      const float4 s = load_global(reinterpret_cast<const float4*>(from + quarter + i));
      cosine[i] = c.x, cosine[i + 1] = c.y, cosine[i + 2] = c.z, cosine[i + 3] = c.w;
      sine[i] = s.x, sine[i + 1] = s.y, sine[i + 2] = s.z, sine[i + 3] = s.w;
    }
  }
}

template <int Width, int N>
__device__ __forceinline__ void load_angles(float (&cosine)[N], float (&sine)[N], const float* rope, RopeRows rows,
                                            int first) {
  load_angles(cosine, sine, rope, rows, first, Width / 4);
}

// (low, high) <- the pair turned by the angle, or back where Inverse.
template <bool Inverse>
__device__ __forceinline__ void turn(float& low, float& high, float cosine, float sine) {
  const float x = low, y = high, s = Inverse ? -sine : sine;
  low = fmaf(x, cosine, -(y * s));
  high = fmaf(y, cosine, x * s);
}

// Two packed pairs at once, rounded.
template <Element E, bool Inverse>
__device__ __forceinline__ void turn_packed(uint32_t& low, uint32_t& high, float cosine0, float sine0, float cosine1,
                                            float sine1) {
  float2 x = unpack<E>(low), y = unpack<E>(high);
  turn<Inverse>(x.x, y.x, cosine0, sine0);
  turn<Inverse>(x.y, y.y, cosine1, sine1);
  low = pack<E>(x.x, x.y), high = pack<E>(y.x, y.y);
}

// A left operand of 16 rows, all Width = 16 KT columns; upper, lower: of the rows lane / 4 and lane / 4 + 8.
template <Element E, bool Inverse, int KT>
__device__ __forceinline__ void rotate_left(uint32_t (&a)[KT][4], const float* rope, RopeRows upper, RopeRows lower) {
#pragma unroll
  for (int k = 0; k < KT / 2; ++k) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      float cosine[2], sine[2];
      load_angles(cosine, sine, rope, q & 1 ? lower : upper, 16 * k + 8 * (q >> 1) + 2 * (lane_index() & 3), 4 * KT);
      turn_packed<E, Inverse>(a[k][q], a[k + KT / 2][q], cosine[0], sine[0], cosine[1], sine[1]);
    }
  }
}

// Accumulators of 16 rows, all Width = 8 NT columns; rows as above.
template <bool Inverse, int NT>
__device__ __forceinline__ void rotate_accumulators(float (&d)[NT][4], const float* rope, RopeRows upper,
                                                    RopeRows lower) {
#pragma unroll
  for (int n = 0; n < NT / 2; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float cosine[2], sine[2];
      load_angles(cosine, sine, rope, half ? lower : upper, 8 * n + 2 * (lane_index() & 3), 2 * NT);
#pragma unroll
      for (int i = 0; i < 2; ++i) turn<Inverse>(d[n][2 * half + i], d[n + NT / 2][2 * half + i], cosine[i], sine[i]);
    }
  }
}

// Chunks `chunk` (8 elements of 2 bytes) and `chunk` + Width/16 of one token's row.
template <Element E, bool Inverse, int Width>
__device__ __forceinline__ void rotate_chunks(uint4& low, uint4& high, const float* rope, RopeRows rows, int chunk) {
  float cosine[8], sine[8];
  load_angles(cosine, sine, rope, rows, 8 * chunk, Width / 4);
  turn_packed<E, Inverse>(low.x, high.x, cosine[0], sine[0], cosine[1], sine[1]);
  turn_packed<E, Inverse>(low.y, high.y, cosine[2], sine[2], cosine[3], sine[3]);
  turn_packed<E, Inverse>(low.z, high.z, cosine[4], sine[4], cosine[5], sine[5]);
  turn_packed<E, Inverse>(low.w, high.w, cosine[6], sine[6], cosine[7], sine[7]);
}

}  // namespace dinov3_ext
