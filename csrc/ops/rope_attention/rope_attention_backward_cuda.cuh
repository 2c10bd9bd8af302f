// Kernels of the backward of rope_attention: bf16 and fp16, E = 64 and 128.
//
// With P = 2^(scale log2(e) R(q) R(k)^T - lse) recomputed, G the gradient of `out` and delta = rowsum(G * out):
//   dS = P * (G V^T - delta),   dV = P^T G,   dQ = scale R^-1(dS R(k)),   dK = scale R^-1(dS^T R(q))
//
// backward_resident, for sequences whose Q and G fit in shared memory (up to 288 tokens): a block owns one sequence and
//   head, 16 queries or 32 to a warp, and walks over the keys BK at a time. Every warp makes P and dS of its queries
//   (two products) and adds dS K to its dQ in registers; P and dS go to shared memory, rounded, and after a barrier the
//   warps share out dV and dK of these BK keys, summed over all queries at once and written to memory. Five products,
//   no atomics, no fp32 gradient in memory, rotation of q and k once in shared memory. Counted traffic: q, k, v, out,
//   grad read once, dq, dk, dv written once = 16 bytes per element. Why queries own the registers and not keys: dQ
//   takes half the registers of dK and dV, so that 272 tokens of width 128 fit (9 warps, 128 of 224 registers). A block
//   has just the warps its sequences need (54 tokens: 4, 5 tokens: 1), so nothing is gained by several heads in one
//   block.
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
#include "ops/rope_attention/rope_attention.h"

namespace dinov3_ext {

// ---- which rows a block works on ----

struct BackwardGroup {
  int64_t first_sequence, first_token;
  uint32_t first_block;   // of this launch
  uint32_t row_blocks;    // blocks of one sequence and head
  int32_t rows_of_block;  // a multiple of 16
  int32_t tokens;
};

struct BackwardPlan {
  int32_t warps;     // of a block
  int32_t rows;      // backward_resident: rows of the longest sequence, a multiple of 16
  int32_t count;     // groups in this launch, longest sequences first
  float scale_log2;  // scale log2(e)
  BackwardGroup groups[kMaxGroups];
};

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

// For 16 MT queries and 8 NT keys, of which `valid_keys` exist: keep_p(P) and keep_ds(dS), rounded, as left operands
// [MT][NT / 2][4]; dq += dS K. P is handed over before the second product, so that it takes no registers there.
template <Element T, int Width, int MT, int NT, class KeepP, class KeepDs>
__device__ __forceinline__ void query_step(float (&dq)[MT][Width / 8][4], Tile<Width> query, Tile<Width> grad,
                                           int query_row, Tile<Width> key, Tile<Width> value, int key_row,
                                           int valid_keys, const float (&lse)[MT][2], const float (&delta)[MT][2],
                                           float scale_log2, KeepP keep_p, KeepDs keep_ds) {
  uint32_t rounded[MT][NT / 2][4];
  float s[MT][NT][4] = {};
#pragma unroll 2
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
  for (int m = 0; m < MT; ++m) round_to_left<T, NT / 2>(rounded[m], s[m]);
  keep_p(rounded);

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
    round_to_left<T, NT / 2>(rounded[m], d[m]);
  }
  keep_ds(rounded);
  product_with_columns<T>(dq, rounded, key, key_row, 0);
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

// ---- short sequences ----

// Bytes of shared memory: Q, G | K, V of BK keys | P, dS (rows x BK each).
constexpr int resident_shared_bytes(int width, int rows, int key_rows) {
  return 2 * (2 * rows * width + 2 * key_rows * width + rows * 2 * key_rows);
}

// grid (sequences x heads of the plan's groups). MT: 16-row parts of a warp; KeyRows: 16 or 32; Warps: at most.
template <Element T, int Width, int MT, int KeyRows, int Warps>
__global__ void __launch_bounds__(32 * Warps) backward_resident(RopeAttentionBackward args, BackwardPlan plan) {
  constexpr int kStepKeys = MT == 2 && Width == 128 ? 16 : KeyRows;  // 32 keys at once would not leave room for dQ
  constexpr int kGroups = Width / 32;
  const int heads = args.packed.heads, threads = 32 * plan.warps;
  const BackwardBlock block = backward_block(plan, heads);
  const int tokens = block.tokens, tiles = block.rows / 16;
  const float* rope = args.packed.rope;
  const RopeGrid grid = load_rope_grid(args.packed.sequences, block.sequence);
  const Rows keys = rows_of(args.qkv, args.stride, 1, block), values = rows_of(args.qkv, args.stride, 2, block);

  const Tile<Width> query{shared_base()}, grad{query.base + uint32_t(plan.rows) * Tile<Width>::kRowBytes},
      key{grad.base + uint32_t(plan.rows) * Tile<Width>::kRowBytes}, value{key.base + KeyRows * Tile<Width>::kRowBytes};
  const Tile<2 * KeyRows> weights{value.base + KeyRows * Tile<Width>::kRowBytes};  // P, then dS, along the columns

  copy_rows_async(query, rows_of(args.qkv, args.stride, 0, block), 0, block.rows, tokens, threads);
  copy_rows_async(key, keys, 0, block.rows < KeyRows ? block.rows : KeyRows, tokens, threads);
  copy_rows_async(grad, rows_of(args.grad, args.grad_stride, 0, block), 0, block.rows, tokens, threads);
  copy_rows_async(value, values, 0, block.rows < KeyRows ? block.rows : KeyRows, tokens, threads);
  copy_async_commit();

  // A warp whose last part lies behind the end takes the part before its first as well, and keeps nothing of it.
  const int own_tile = warp_index() * MT;
  const int first_tile = own_tile + MT <= tiles ? own_tile : tiles - MT, row = 16 * first_tile;
  const bool busy = own_tile < tiles;
  float lse[MT][2], delta[MT][2], dq[MT][Width / 8][4] = {};
  uint4 out[MT][2][Width / 32];
  if (busy) {
    load_query_lse(lse, args.lse + block.head * args.packed.tokens + block.first_token, row, tokens);
    load_out_rows<Width>(out, packed_rows<Width>(args.out, 1, 0, heads, block), row, tokens);
  }
  copy_async_wait<0>();
  rotate_copied_rows<T>(query, rope, grid, 0, block.rows, tokens, threads);
  rotate_copied_rows<T>(key, rope, grid, 0, block.rows < KeyRows ? block.rows : KeyRows, tokens, threads);
  block_barrier();
  if (busy) make_delta<T, Width>(delta, out, grad, row);

  for (int first_key = 0; first_key < tokens; first_key += KeyRows) {
    const int key_tiles = tiles - first_key / 16 < KeyRows / 16 ? tiles - first_key / 16 : KeyRows / 16;
    if (busy) {
      const auto step = [&]<int NT>(int key_row) {
        const auto keep_at = [&](int column) {
          return [&, column](const uint32_t(&weight)[MT][NT / 2][4]) {
#pragma unroll
            for (int m = 0; m < MT; ++m) {
              if (first_tile + m >= own_tile) store_left(weights, weight[m], row + 16 * m, column);
            }
          };
        };
        query_step<T, Width, MT, NT>(dq, query, grad, row, key, value, key_row, tokens - first_key - key_row, lse,
                                     delta, plan.scale_log2, keep_at(key_row), keep_at(KeyRows + key_row));
      };
      if (kStepKeys == 32 && key_tiles == 2) {
        step.template operator()<4>(0);
      } else {
        for (int t = 0; t < key_tiles; ++t) step.template operator()<2>(16 * t);
      }
    }
    block_barrier();

    // The buffers of K and V are free: the next keys travel while dV and dK are made.
    const int next = first_key + KeyRows, next_rows = 16 * tiles - next < KeyRows ? 16 * tiles - next : KeyRows;
    if (next < tokens) {
      copy_rows_async(key, keys, next, next_rows, tokens, threads);
      copy_rows_async(value, values, next, next_rows, tokens, threads);
      copy_async_commit();
    }
    for (int unit = warp_index(); unit < key_tiles * 2 * kGroups; unit += plan.warps) {
      const int t = unit / (2 * kGroups), g = unit % kGroups;
      const bool is_key = unit / kGroups % 2;
      const Tile<Width> right = is_key ? query : grad;
      float low[1][2][4] = {}, high[1][2][4] = {};
#pragma unroll 2
      for (int k = 0; k < tiles; ++k) {
        uint32_t a[1][1][4];
        load_left_transposed(a, weights, 16 * k, 16 * t + (is_key ? KeyRows : 0));
        product_with_columns<T>(low, a, right, 16 * k, 16 * g);
        product_with_columns<T>(high, a, right, 16 * k, Width / 2 + 16 * g);
      }
      store_columns<T, Width>(grad_rows<Width>(args.qkv_grad, is_key ? 1 : 2, heads, block), low[0], high[0],
                              is_key ? args.scale : 1.f, is_key, rope, grid, first_key + 16 * t, tokens, g);
    }
    if (next < tokens) {
      copy_async_wait<0>();
      rotate_copied_rows<T>(key, rope, grid, next, next_rows, tokens, threads);
    }
    block_barrier();
  }
  if (!busy) return;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    if (first_tile + m < own_tile) continue;
    store_rows<T, Width>(grad_rows<Width>(args.qkv_grad, 0, heads, block), dq[m], args.scale, true, rope, grid,
                         row + 16 * m, tokens);
  }
}

// ---- long sequences: queries ----

template <int Width, int MT, int Warps, int KeyRows>
constexpr int backward_queries_shared_bytes() {
  return 2 * Width * (2 * 16 * MT * Warps + 2 * 2 * KeyRows);
}

// grid (row blocks x heads x sequences). Makes dQ, and delta for backward_keys.
template <Element T, int Width, int MT, int Warps, int KeyRows>
__global__ void __launch_bounds__(32 * Warps) backward_queries(RopeAttentionBackward args, BackwardPlan plan) {
  constexpr int kRows = 16 * MT * Warps, kThreads = 32 * Warps;
  constexpr uint32_t kStage = 2 * KeyRows * Tile<Width>::kRowBytes;
  const int heads = args.packed.heads;
  const BackwardBlock block = backward_block(plan, heads);
  const int tokens = block.tokens, first_row = block.first_row;
  const Rows keys = packed_rows<Width>(args.rotated, 2, 1, heads, block),
             values = rows_of(args.qkv, args.stride, 2, block);
  const int64_t row_sums = block.head * args.packed.tokens + block.first_token;  // of lse and delta

  const Tile<Width> query{shared_base()}, grad{query.base + kRows * Tile<Width>::kRowBytes};
  const uint32_t stages = grad.base + kRows * Tile<Width>::kRowBytes;
  const auto copy_keys = [&](int first_key) {
    const uint32_t stage = stages + (first_key / KeyRows & 1) * kStage;
    copy_rows_async(Tile<Width>{stage}, keys, first_key, KeyRows, tokens, kThreads);
    copy_rows_async(Tile<Width>{stage + kStage / 2}, values, first_key, KeyRows, tokens, kThreads);
    copy_async_commit();
  };
  copy_rows_async(query, packed_rows<Width>(args.rotated, 2, 0, heads, block), first_row, kRows, tokens, kThreads);
  copy_rows_async(grad, rows_of(args.grad, args.grad_stride, 0, block), first_row, kRows, tokens, kThreads);
  copy_keys(0);

  const int tile_row = 16 * MT * warp_index(), row = first_row + tile_row;
  const bool busy = tile_row < block.rows;
  float lse[MT][2], delta[MT][2], dq[MT][Width / 8][4] = {};
  uint4 out[MT][2][Width / 32];
  if (busy) {
    load_query_lse(lse, args.lse + row_sums, row, tokens);
    load_out_rows<Width>(out, packed_rows<Width>(args.out, 1, 0, heads, block), row, tokens);
  }
  for (int first_key = 0; first_key < tokens; first_key += KeyRows) {
    copy_async_wait<0>();
    block_barrier();  // these keys have arrived, and nobody reads the other buffer any more
    if (first_key + KeyRows < tokens) copy_keys(first_key + KeyRows);
    if (!busy) continue;
    if (first_key == 0) make_delta<T, Width>(delta, out, grad, tile_row);
    const uint32_t stage = stages + (first_key / KeyRows & 1) * kStage;
    const auto nothing = [](const uint32_t(&)[MT][KeyRows / 16][4]) {};
    query_step<T, Width, MT, KeyRows / 8>(dq, query, grad, tile_row, Tile<Width>{stage},
                                          Tile<Width>{stage + kStage / 2}, 0, tokens - first_key, lse, delta,
                                          plan.scale_log2, nothing, nothing);
  }
  if (!busy) return;
  const RopeGrid grid = load_rope_grid(args.packed.sequences, block.sequence);
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    if (tile_row + 16 * m >= block.rows) continue;  // another block's rows
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + 16 * m + 8 * half + (lane_index() >> 2);
      if ((lane_index() & 3) == 0 && at < tokens) store_global(args.delta + row_sums + at, delta[m][half]);
    }
    store_rows<T, Width>(grad_rows<Width>(args.qkv_grad, 0, heads, block), dq[m], args.scale, true, args.packed.rope,
                         grid, row + 16 * m, tokens);
  }
}

// ---- long sequences: keys ----

template <int Width, int MT, int Warps, int QueryRows>
constexpr int backward_keys_shared_bytes() {
  return 2 * Width * (2 * 16 * MT * Warps + 2 * 2 * QueryRows) + 2 * 2 * QueryRows * 4;
}

// grid (row blocks x heads x sequences). Makes dK and dV from the delta of backward_queries.
template <Element T, int Width, int MT, int Warps, int QueryRows>
__global__ void __launch_bounds__(32 * Warps) backward_keys(RopeAttentionBackward args, BackwardPlan plan) {
  constexpr int kRows = 16 * MT * Warps, kThreads = 32 * Warps, NT = QueryRows / 8;
  constexpr uint32_t kStage = 2 * QueryRows * Tile<Width>::kRowBytes;
  static_assert(2 * QueryRows <= kThreads);
  const int heads = args.packed.heads;
  const BackwardBlock block = backward_block(plan, heads);
  const int tokens = block.tokens, first_row = block.first_row;
  const Rows queries = packed_rows<Width>(args.rotated, 2, 0, heads, block),
             grads = rows_of(args.grad, args.grad_stride, 0, block);
  const int64_t row_sums = block.head * args.packed.tokens + block.first_token;

  const Tile<Width> key{shared_base()}, value{key.base + kRows * Tile<Width>::kRowBytes};
  const uint32_t stages = value.base + kRows * Tile<Width>::kRowBytes;
  const uint32_t sums = stages + 2 * kStage;  // two stages of lse (QueryRows) and delta (QueryRows)
  const auto copy_queries = [&](int first_query) {
    const uint32_t stage = stages + (first_query / QueryRows & 1) * kStage;
    copy_rows_async(Tile<Width>{stage}, queries, first_query, QueryRows, tokens, kThreads);
    copy_rows_async(Tile<Width>{stage + kStage / 2}, grads, first_query, QueryRows, tokens, kThreads);
    copy_async_commit();
  };
  // A thread brings lse or delta of one query: they lie at any multiple of 4 bytes.
  const int sum_row = thread_index() % QueryRows;
  const bool takes_lse = thread_index() < QueryRows, takes_sum = thread_index() < 2 * QueryRows;
  const auto load_sum = [&](int first_query) {
    const bool valid = takes_sum && first_query + sum_row < tokens;
    if (!valid) return takes_lse ? kNothing : 0.f;
    return load_global((takes_lse ? args.lse : args.delta) + row_sums + first_query + sum_row);
  };
  const auto store_sum = [&](int first_query, float sum) {
    if (takes_sum) store_shared(sums + (first_query / QueryRows & 1) * 8 * QueryRows + 4 * thread_index(), sum);
  };
  copy_rows_async(key, packed_rows<Width>(args.rotated, 2, 1, heads, block), first_row, kRows, tokens, kThreads);
  copy_rows_async(value, rows_of(args.qkv, args.stride, 2, block), first_row, kRows, tokens, kThreads);
  copy_queries(0);
  store_sum(0, load_sum(0));

  const int tile_row = 16 * MT * warp_index();
  const bool busy = tile_row < block.rows;
  float dk[MT][Width / 8][4] = {}, dv[MT][Width / 8][4] = {};
  for (int first_query = 0; first_query < tokens; first_query += QueryRows) {
    copy_async_wait<0>();
    block_barrier();
    const int next = first_query + QueryRows;
    float next_sum = 0.f;
    if (next < tokens) copy_queries(next), next_sum = load_sum(next);
    if (busy) {
      const uint32_t stage = stages + (first_query / QueryRows & 1) * kStage;
      const uint32_t lse = sums + (first_query / QueryRows & 1) * 8 * QueryRows;
      const Tile<Width> query{stage}, grad{stage + kStage / 2};
      uint32_t p[MT][NT / 2][4];
      float s[MT][NT][4] = {};  // keys along the rows, queries along the columns
#pragma unroll
      for (int k = 0; k < Width / 16; ++k) {
        uint32_t a[MT][1][4];
        load_left(a, key, tile_row, 16 * k);
        product_with_rows<T>(s, a, query, 0, 16 * k);
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const float2 column = load_shared<float2>(lse + 4 * accumulator_column(n, 0));
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            s[m][n][q] = exp2_approx(fmaf(s[m][n][q], plan.scale_log2, -(q & 1 ? column.y : column.x)));
          }
        }
      }
#pragma unroll
      for (int m = 0; m < MT; ++m) round_to_left<T, NT / 2>(p[m], s[m]);
      product_with_columns<T>(dv, p, grad, 0, 0);
      float d[MT][NT][4] = {};
#pragma unroll 2  // whole, it spills 40 bytes at width 64
      for (int k = 0; k < Width / 16; ++k) {
        uint32_t a[MT][1][4];
        load_left(a, value, tile_row, 16 * k);
        product_with_rows<T>(d, a, grad, 0, 16 * k);
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const float2 column = load_shared<float2>(lse + 4 * QueryRows + 4 * accumulator_column(n, 0));
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
          for (int q = 0; q < 4; ++q) d[m][n][q] = s[m][n][q] * (d[m][n][q] - (q & 1 ? column.y : column.x));
        }
      }
#pragma unroll
      for (int m = 0; m < MT; ++m) round_to_left<T, NT / 2>(p[m], d[m]);
      product_with_columns<T>(dk, p, query, 0, 0);
    }
    if (next < tokens) store_sum(next, next_sum);
  }
  if (!busy) return;
  const RopeGrid grid = load_rope_grid(args.packed.sequences, block.sequence);
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    if (tile_row + 16 * m >= block.rows) continue;
    const int row = first_row + tile_row + 16 * m;
    store_rows<T, Width>(grad_rows<Width>(args.qkv_grad, 1, heads, block), dk[m], args.scale, true, args.packed.rope,
                         grid, row, tokens);
    store_rows<T, Width>(grad_rows<Width>(args.qkv_grad, 2, heads, block), dv[m], 1.f, false, args.packed.rope, grid,
                         row, tokens);
  }
}

}  // namespace dinov3_ext
