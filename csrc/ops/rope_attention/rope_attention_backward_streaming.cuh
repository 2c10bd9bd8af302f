// Backward of rope_attention for long sequences, on q and k that rope_rotate has turned.
#pragma once

#include "ops/rope_attention/rope_attention_backward_cuda.cuh"

namespace dinov3_ext {

// ---- long sequences: queries ----

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
    uint32_t ds[MT][KeyRows / 16][4];
    make_weights<T, Width, MT, KeyRows / 8>(ds, query, grad, tile_row, Tile<Width>{stage},
                                            Tile<Width>{stage + kStage / 2}, 0, tokens - first_key, lse, delta,
                                            plan.scale_log2, [](const auto&) {});
    product_with_columns<T>(dq, ds, Tile<Width>{stage}, 0, 0);
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
