// What the kernels of the backward of rope_attention share: bf16 and fp16, E = 64 and 128.
//
// With P = 2^(scale log2(e) R(q) R(k)^T - lse) recomputed, G the gradient of `out` and delta = rowsum(G * out):
//   dS = P * (G V^T - delta),   dV = P^T G,   dQ = scale R^-1(dS R(k)),   dK = scale R^-1(dS^T R(q))
//
// backward_resident, for sequences whose Q and G fit in shared memory (E = 64: up to 288 tokens; E = 128: 256, and 272
//   where a block has 227 KB): a block owns one sequence and head, 16 queries or 32 to a warp, and walks over the keys
//   32 (or 16) at a time. Every warp makes P and dS of its queries (two products) and adds dS K to its dQ in registers;
//   P and dS go to shared memory, rounded, and after a barrier the warps share out dV and dK of these keys, summed over
//   all queries at once and written to memory. Five products, no atomics, no fp32 gradient in memory, rotation of q and
//   k once, in shared memory. Counted traffic: q, k, v, out, grad read once, dq, dk, dv written once = 16 bytes per
//   element. Why queries own the registers and not keys: dQ takes half the registers of dK and dV, so that 261 tokens
//   of width 128 fit. A block has just the warps its sequences need (54 tokens: 4, 5 tokens: 1), so nothing is gained
//   by several heads in one block.
//
// backward_queries, then backward_keys, for longer sequences, on q and k that rope_rotate has turned (2 x 4 bytes per
//   element): a block owns queries (keys) and streams keys (queries) through two buffers, one barrier a step. Seven
//   products, deterministic. backward_queries also makes delta of its rows, on the way. The transposed products
//   S^T = K Q^T of backward_keys give P^T and dS^T as left operands: they never leave the registers.
//   Counted traffic: 8 (rope_rotate) + 12 (backward_queries) + 12 (backward_keys) = 32 bytes per element, plus k, v (q,
//   grad) again for every further block of a sequence, from the L2 cache.
//
// Rows behind a sequence's end are zeros, their lse is so large that P is 0; keys behind the end get P = 0 by a test in
// the last step only. Every accumulator pair (e, e + E/2) lies in one thread, so gradients are turned back in fp32 and
// rounded once; four lanes then exchange words so that each stores 16 bytes and every 32-byte sector is written whole.
#pragma once

#include "core/primitives.cuh"
#include "core/rope.cuh"
#include "core/tile.cuh"
#include "ops/rope_attention/rope_attention_backward_plan.h"

namespace dinov3_ext {

// ---- which rows a block works on ----

struct BackwardBlock {
  int64_t sequence;     // its row in the table of sequences
  int64_t first_token;  // of the sequence
  int tokens, head;
  int first_row, rows;  // of this block, within the sequence; rows: a multiple of 16, the last may lie behind the end
};

// Row blocks of one sequence and head are neighbours: they read the same data.
__device__ __forceinline__ BackwardBlock backward_block(const BackwardPlan& plan, int heads) {
  const uint32_t block = uint32_t(block_index<0>());
  int g = 0;
  while (g + 1 < plan.count && block >= plan.groups[g + 1].first_block) ++g;
  const BackwardGroup& group = plan.groups[g];
  const uint32_t index = block - group.first_block, item = index / group.row_blocks;
  const uint32_t sequence = item / uint32_t(heads);
  const int first_row = int(index - item * group.row_blocks) * group.rows_of_block;
  const int behind = (group.tokens + 15) / 16 * 16 - first_row;
  return {group.first_sequence + sequence,
          group.first_token + int64_t(sequence) * group.tokens,
          group.tokens,
          int(item - sequence * uint32_t(heads)),
          first_row,
          behind < group.rows_of_block ? behind : group.rows_of_block};
}

// One head of one tensor from the sequence's first token on.
struct Rows {
  const uint16_t* first;
  int64_t stride;  // elements from token to token
};

__device__ __forceinline__ Rows rows_of(const void* data, const RopeStrides& stride, int part,
                                        const BackwardBlock& block) {
  return {static_cast<const uint16_t*>(data) + block.first_token * stride.token + part * stride.part +
              block.head * stride.head,
          stride.token};
}

// The same for contiguous (tokens, parts, H, Width).
template <int Width>
__device__ __forceinline__ Rows packed_rows(const void* data, int parts, int part, int heads,
                                            const BackwardBlock& block) {
  const int64_t row = int64_t(heads) * Width;
  return rows_of(data, {parts * row, row, Width}, part, block);
}

// ---- between global and shared memory ----

// A thread's pair of 16-byte chunks (chunk, chunk + Width / 16) of one row: the pair that the rotation mixes. Rows are
// `row`, `chunk` of task `index`; odd rows take the upper chunk first, so that eight lanes always meet eight different
// bank groups.
template <int Width>
struct ChunkPair {
  static constexpr int kPairs = Width / 16;
  int row, chunk, first, second;
  __device__ __forceinline__ explicit ChunkPair(int index)
      : row(index / kPairs),
        chunk(index % kPairs),
        first(chunk + (row & 1 ? kPairs : 0)),
        second(chunk + (row & 1 ? 0 : kPairs)) {}
};

// Starts copying rows first_row .. first_row + rows - 1 of a sequence; those from `tokens` on become zero.
template <int Width>
__device__ __forceinline__ void copy_rows_async(Tile<Width> to, const Rows& from, int first_row, int rows, int tokens,
                                                int threads) {
  for (int index = thread_index(); index < rows * ChunkPair<Width>::kPairs; index += threads) {
    const ChunkPair<Width> pair(index);
    const bool valid = first_row + pair.row < tokens;
    const uint16_t* row = from.first + (valid ? (first_row + pair.row) * from.stride : 0);
    copy_async(to.address(pair.row, pair.first), row + 8 * pair.first, valid);
    copy_async(to.address(pair.row, pair.second), row + 8 * pair.second, valid);
  }
}

// Turns the rows that copy_rows_async brought, called with the same arguments: every thread turns what it copied
// itself, so that copy_async_wait is enough and no barrier is needed before.
template <Element T, int Width>
__device__ __forceinline__ void rotate_copied_rows(Tile<Width> tile, const float* rope, const RopeGrid& grid,
                                                   int first_row, int rows, int tokens, int threads) {
  for (int index = thread_index(); index < rows * ChunkPair<Width>::kPairs; index += threads) {
    const ChunkPair<Width> pair(index);
    const RopeRows at = rope_rows(grid, first_row + pair.row, tokens);
    if (at.y < 0) continue;
    const bool odd = pair.row & 1;
    const uint32_t first = tile.address(pair.row, pair.first), second = tile.address(pair.row, pair.second);
    const uint4 a = load_shared<uint4>(first), b = load_shared<uint4>(second);
    uint4 low = odd ? b : a, high = odd ? a : b;
    rotate_chunks<T, false, Width>(low, high, rope, at, pair.chunk);
    store_shared(first, odd ? high : low);
    store_shared(second, odd ? low : high);
  }
}

// Lane c of four neighbours has word t of tile t; after it, lane c has the words of tile c, of the four lanes in order.
__device__ __forceinline__ uint4 transpose_quad(const uint32_t (&word)[4]) {
  const bool odd = lane_index() & 1, high = lane_index() & 2;
  const uint32_t from0 = shuffle_xor(odd ? word[0] : word[1], 1), from2 = shuffle_xor(odd ? word[2] : word[3], 1);
  const uint2 lower = odd ? uint2{from0, word[1]} : uint2{word[0], from0};  // tile c & 1, of this pair of lanes
  const uint2 upper = odd ? uint2{from2, word[3]} : uint2{word[2], from2};  // tile 2 + (c & 1)
  const uint32_t x = shuffle_xor(high ? lower.x : upper.x, 2), y = shuffle_xor(high ? lower.y : upper.y, 2);
  return high ? uint4{x, y, upper.x, upper.y} : uint4{lower.x, lower.y, x, y};
}

// Where a gradient goes: one part of qkv_grad, from the sequence's first token on.
struct GradRows {
  uint16_t* first;
  int64_t stride;
};
template <int Width>
__device__ __forceinline__ GradRows grad_rows(void* qkv_grad, int part, int heads, const BackwardBlock& block) {
  const int64_t row = int64_t(heads) * Width;
  return {static_cast<uint16_t*>(qkv_grad) + block.first_token * 3 * row + part * row + block.head * Width, 3 * row};
}

// Stores columns 16 g .. 16 g + 15 (low) and the same + Width / 2 (high) of the 16 rows from `first_row` on, turned
// back where `turned`, times `factor`.
template <Element T, int Width>
__device__ __forceinline__ void store_columns(const GradRows& to, float (&low)[2][4], float (&high)[2][4], float factor,
                                              bool turned, const float* rope, const RopeGrid& grid, int first_row,
                                              int tokens, int g) {
  const int c = lane_index() & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + 8 * half + (lane_index() >> 2);
    const RopeRows at = rope_rows(grid, row, tokens);
    uint32_t word[4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float x[2], y[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) x[i] = low[n][2 * half + i] * factor, y[i] = high[n][2 * half + i] * factor;
      if (turned && at.y >= 0) {
        float cosine[2], sine[2];
        load_angles<Width>(cosine, sine, rope, at, 16 * g + 8 * n + 2 * c);
#pragma unroll
        for (int i = 0; i < 2; ++i) turn<true>(x[i], y[i], cosine[i], sine[i]);
      }
      word[n] = pack<T>(x[0], x[1]), word[2 + n] = pack<T>(y[0], y[1]);
    }
    const uint4 chunk = transpose_quad(word);
    const int column = 16 * g + (c & 1) * 8 + (c & 2 ? Width / 2 : 0);
    if (row < tokens) store_global(reinterpret_cast<uint4*>(to.first + row * to.stride + column), chunk);
  }
}

// All columns of 16 rows.
template <Element T, int Width>
__device__ __forceinline__ void store_rows(const GradRows& to, float (&d)[Width / 8][4], float factor, bool turned,
                                           const float* rope, const RopeGrid& grid, int first_row, int tokens) {
#pragma unroll
  for (int g = 0; g < Width / 32; ++g) {
    float low[2][4], high[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) low[n][i] = d[2 * g + n][i], high[n][i] = d[Width / 16 + 2 * g + n][i];
    }
    store_columns<T, Width>(to, low, high, factor, turned, rope, grid, first_row, tokens, g);
  }
}

// ---- lse and delta of a warp's query rows: index [m][half] is row lane / 4 + 8 half of the m-th 16 rows ----

inline constexpr float kNothing = 1e30f;  // lse of a row behind the end: P = 2^-1e30 = 0

template <int MT>
__device__ __forceinline__ void load_query_lse(float (&lse)[MT][2], const float* from, int first_row, int tokens) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * m + 8 * half + (lane_index() >> 2);
      lse[m][half] = row < tokens ? load_global(from + row) : kNothing;
    }
  }
}

// Chunk of a row that lane c of four reads in turn i: all chunks in Width / 32 turns; odd rows start with the other
// half of the banks.
template <int Width>
__device__ __forceinline__ int delta_chunk(int i) {
  return (lane_index() & 3) + 4 * ((i + ((lane_index() >> 2) & 1)) & (Width / 32 - 1));
}

template <int Width, int MT>
__device__ __forceinline__ void load_out_rows(uint4 (&out)[MT][2][Width / 32], const Rows& from, int first_row,
                                              int tokens) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * m + 8 * half + (lane_index() >> 2);
#pragma unroll
      for (int i = 0; i < Width / 32; ++i) {
        out[m][half][i] = uint4{0, 0, 0, 0};
        if (row < tokens) {
          out[m][half][i] = load_global_once(
              reinterpret_cast<const uint4*>(from.first + row * from.stride + 8 * delta_chunk<Width>(i)));
        }
      }
    }
  }
}

template <Element T>
__device__ __forceinline__ float dot_packed(uint32_t a, uint32_t b, float sum) {
  const float2 x = unpack<T>(a), y = unpack<T>(b);
  return fmaf(x.y, y.y, fmaf(x.x, y.x, sum));
}

// delta = sum over e of grad * out; `grad` holds the gradient's rows, the first of this warp at tile_row.
template <Element T, int Width, int MT>
__device__ __forceinline__ void make_delta(float (&delta)[MT][2], const uint4 (&out)[MT][2][Width / 32],
                                           Tile<Width> grad, int tile_row) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < Width / 32; ++i) {
        const uint4 g =
            load_shared<uint4>(grad.address(tile_row + 16 * m + 8 * half + (lane_index() >> 2), delta_chunk<Width>(i)));
        const uint4 o = out[m][half][i];
        sum = dot_packed<T>(g.x, o.x, sum), sum = dot_packed<T>(g.y, o.y, sum);
        sum = dot_packed<T>(g.z, o.z, sum), sum = dot_packed<T>(g.w, o.w, sum);
      }
      sum += shuffle_xor(sum, 1);
      delta[m][half] = sum + shuffle_xor(sum, 2);
    }
  }
}

// ---- one step of a warp that owns queries ----

// P and dS of 16 MT queries and 8 NT keys, of which `valid_keys` exist, rounded, as left operands. P is handed over,
// keep_p(P), before the second product, so that it takes no registers there.
template <Element T, int Width, int MT, int NT, class KeepP>
__device__ __forceinline__ void make_weights(uint32_t (&ds)[MT][NT / 2][4], Tile<Width> query, Tile<Width> grad,
                                             int query_row, Tile<Width> key, Tile<Width> value, int key_row,
                                             int valid_keys, const float (&lse)[MT][2], const float (&delta)[MT][2],
                                             float scale_log2, KeepP keep_p) {
  float s[MT][NT][4] = {};
#pragma unroll 2  // whole, these two loops spill up to 88 bytes
  for (int k = 0; k < Width / 16; ++k) {
    uint32_t a[MT][1][4];
    load_left(a, query, query_row, 16 * k);
    product_with_rows<T>(s, a, key, key_row, 16 * k);
  }
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int q = 0; q < 4; ++q) s[m][n][q] = exp2_approx(fmaf(s[m][n][q], scale_log2, -lse[m][q >> 1]));
    }
  }
  if (valid_keys < 8 * NT) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int q = 0; q < 4; ++q) s[m][n][q] = accumulator_column(n, q) < valid_keys ? s[m][n][q] : 0.f;
      }
    }
  }
#pragma unroll
  for (int m = 0; m < MT; ++m) round_to_left<T, NT / 2>(ds[m], s[m]);
  keep_p(ds);

  float d[MT][NT][4] = {};
#pragma unroll 2
  for (int k = 0; k < Width / 16; ++k) {
    uint32_t a[MT][1][4];
    load_left(a, grad, query_row, 16 * k);
    product_with_rows<T>(d, a, value, key_row, 16 * k);
  }
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int q = 0; q < 4; ++q) d[m][n][q] = s[m][n][q] * (d[m][n][q] - delta[m][q >> 1]);
    }
    round_to_left<T, NT / 2>(ds[m], d[m]);
  }
}

// A left operand of 16 x 16 KT to the tile's (row, column).
template <int KT, int Columns>
__device__ __forceinline__ void store_left(Tile<Columns> tile, const uint32_t (&a)[KT][4], int row, int column) {
#pragma unroll
  for (int k = 0; k < KT; ++k) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      store_shared(tile.element(row + (lane_index() >> 2) + 8 * (q & 1),
                                column + 16 * k + 8 * (q >> 1) + 2 * (lane_index() & 3)),
                   a[k][q]);
    }
  }
}

}  // namespace dinov3_ext
