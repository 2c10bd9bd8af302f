// Backward of rope_attention for sequences that fit in shared memory whole: up to 288 tokens of width 64, 272 of 128.
#pragma once

#include "ops/rope_attention/rope_attention_backward_cuda.cuh"

namespace dinov3_ext {

// Two parts of a warp meet 16 keys at a time where 32 would spill: 24 bytes on sm_120 at width 64 (where 32 keys are
// not chosen anyway, see backward_tiling), and everywhere at width 128, where dQ takes 128 registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
inline constexpr bool kWideStepSpills = true;
#else
inline constexpr bool kWideStepSpills = false;
#endif

// grid (sequences x heads of the plan's groups). MT: 16-row parts of a warp; KeyRows: keys of a step, 16 or 32; Warps:
// at most.
//
// ExtraTile: the sequence has 16 rows more than the warps' registers hold of dQ (261 tokens = 17 x 16 rows of width
// 128, 8 warps x 2). P and dS of these rows are made by the first warps, 16 keys each; their dQ lies in shared memory,
// in fp32, and the first Width / 32 warps add to it together with dV and dK. K is needed longer for that, so the next
// one travels into a second buffer.
template <Element T, int Width, int MT, int KeyRows, int Warps, bool ExtraTile>
__global__ void __launch_bounds__(32 * Warps) backward_resident(RopeAttentionBackward args, BackwardPlan plan) {
  constexpr int kStepKeys = MT == 2 && (Width == 128 || kWideStepSpills) ? 16 : KeyRows;
  constexpr int kGroups = Width / 32;  // of 16 + 16 columns that are turned together
  constexpr uint32_t kKeyBytes = KeyRows * Tile<Width>::kRowBytes;
  static_assert(!ExtraTile || (MT == 2 && KeyRows == 32));
  const int heads = args.packed.heads, threads = 32 * plan.warps;
  const BackwardBlock block = backward_block(plan, heads);
  const int tokens = block.tokens, tiles = block.rows / 16, own_tiles = tiles - ExtraTile;
  const int first_rows = block.rows < KeyRows ? block.rows : KeyRows;
  const float* rope = args.packed.rope;
  const RopeGrid grid = load_rope_grid(args.packed.sequences, block.sequence);
  const Rows keys = rows_of(args.qkv, args.stride, 1, block), values = rows_of(args.qkv, args.stride, 2, block);
  const Rows outs = packed_rows<Width>(args.out, 1, 0, heads, block);
  const float* lse_row = args.lse + block.head * args.packed.tokens + block.first_token;

  const Tile<Width> query{shared_base()}, grad{query.base + uint32_t(plan.rows) * Tile<Width>::kRowBytes},
      value{grad.base + uint32_t(plan.rows) * Tile<Width>::kRowBytes};
  const auto key_of = [&](int first_key) {
    return Tile<Width>{value.base + kKeyBytes + (ExtraTile ? (first_key / KeyRows & 1) * kKeyBytes : 0)};
  };
  const Tile<2 * KeyRows> weights{value.base + (ExtraTile ? 3 : 2) * kKeyBytes};  // P, then dS, along the columns
  // ExtraTile: every lane's own part of dQ (16 floats of each group's warp) and of lse and delta (4 of each step's).
  const uint32_t extra_sums = weights.base + uint32_t(plan.rows) * Tile<2 * KeyRows>::kRowBytes,
                 extra_row_sums = extra_sums + 4 * 16 * Width + 16 * thread_index();

  copy_rows_async(query, rows_of(args.qkv, args.stride, 0, block), 0, block.rows, tokens, threads);
  copy_rows_async(key_of(0), keys, 0, first_rows, tokens, threads);
  copy_rows_async(grad, rows_of(args.grad, args.grad_stride, 0, block), 0, block.rows, tokens, threads);
  copy_rows_async(value, values, 0, first_rows, tokens, threads);
  copy_async_commit();

  // A warp whose last part lies behind the end takes the part before its first as well, and keeps nothing of it.
  const int own_tile = warp_index() * MT;
  const int first_tile = own_tile + MT <= own_tiles ? own_tile : own_tiles - MT, row = 16 * first_tile;
  const bool busy = own_tile < own_tiles;
  float lse[MT][2], delta[MT][2], dq[MT][Width / 8][4] = {};
  uint4 out[MT][2][Width / 32];
  if (busy) {
    load_query_lse(lse, lse_row, row, tokens);
    load_out_rows<Width>(out, outs, row, tokens);
  }
  copy_async_wait<0>();
  rotate_copied_rows<T>(query, rope, grid, 0, block.rows, tokens, threads);
  rotate_copied_rows<T>(key_of(0), rope, grid, 0, first_rows, tokens, threads);
  block_barrier();
  if (busy) make_delta<T, Width>(delta, out, grad, row);
  if (ExtraTile && warp_index() < KeyRows / 16) {
    float extra_lse[1][2], extra_delta[1][2];
    uint4 extra_out[1][2][Width / 32];
    load_query_lse(extra_lse, lse_row, 16 * own_tiles, tokens);
    load_out_rows<Width>(extra_out, outs, 16 * own_tiles, tokens);
    make_delta<T, Width>(extra_delta, extra_out, grad, 16 * own_tiles);
    store_shared(extra_row_sums, float4{extra_lse[0][0], extra_lse[0][1], extra_delta[0][0], extra_delta[0][1]});
  }

  for (int first_key = 0; first_key < tokens; first_key += KeyRows) {
    const int key_tiles = tiles - first_key / 16 < KeyRows / 16 ? tiles - first_key / 16 : KeyRows / 16;
    const Tile<Width> key = key_of(first_key);
    if (busy) {
      const auto step = [&]<int NT>(int key_row) {
        uint32_t ds[MT][NT / 2][4];
        const auto keep = [&](int column) {
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            if (first_tile + m >= own_tile) store_left(weights, ds[m], row + 16 * m, column);
          }
        };
        make_weights<T, Width, MT, NT>(ds, query, grad, row, key, value, key_row, tokens - first_key - key_row, lse,
                                       delta, plan.scale_log2, [&](const auto&) { keep(key_row); });
        keep(KeyRows + key_row);
        product_with_columns<T>(dq, ds, key, key_row, 0);
      };
      if (kStepKeys == 32 && key_tiles == 2) {
        step.template operator()<4>(0);
      } else {
        for (int t = 0; t < key_tiles; ++t) step.template operator()<2>(16 * t);
      }
    }
    if (ExtraTile && warp_index() < key_tiles) {
      const float4 sums = load_shared<float4>(extra_row_sums);
      const float extra_lse[1][2] = {{sums.x, sums.y}}, extra_delta[1][2] = {{sums.z, sums.w}};
      const int key_row = 16 * warp_index();
      uint32_t ds[1][1][4];
      make_weights<T, Width, 1, 2>(ds, query, grad, 16 * own_tiles, key, value, key_row, tokens - first_key - key_row,
                                   extra_lse, extra_delta, plan.scale_log2,
                                   [&](const auto& p) { store_left(weights, p[0], 16 * own_tiles, key_row); });
      store_left(weights, ds[0], 16 * own_tiles, KeyRows + key_row);
    }
    block_barrier();

    // The buffers of V and of the next K are free: the next keys travel while dV and dK are made.
    const int next = first_key + KeyRows, next_rows = 16 * tiles - next < KeyRows ? 16 * tiles - next : KeyRows;
    if (next < tokens) {
      copy_rows_async(key_of(next), keys, next, next_rows, tokens, threads);
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
    if (ExtraTile && warp_index() < kGroups) {
      const int g = warp_index();
      float sum[2][1][2][4] = {};  // 16 rows x (16 + 16) columns
      const auto place = [&](int half, int n) { return extra_sums + 512 * (4 * g + 2 * half + n) + 16 * lane_index(); };
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (first_key == 0) continue;
          const float4 four = load_shared<float4>(place(half, n));
          sum[half][0][n][0] = four.x, sum[half][0][n][1] = four.y;
          sum[half][0][n][2] = four.z, sum[half][0][n][3] = four.w;
        }
      }
      for (int t = 0; t < key_tiles; ++t) {
        uint32_t a[1][1][4];
        load_left(a, weights, 16 * own_tiles, KeyRows + 16 * t);
        product_with_columns<T>(sum[0], a, key, 16 * t, 16 * g);
        product_with_columns<T>(sum[1], a, key, 16 * t, Width / 2 + 16 * g);
      }
      if (next < tokens) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const auto& d = sum[half][0][n];
            store_shared(place(half, n), float4{d[0], d[1], d[2], d[3]});
          }
        }
      } else {
        store_columns<T, Width>(grad_rows<Width>(args.qkv_grad, 0, heads, block), sum[0][0], sum[1][0], args.scale,
                                true, rope, grid, 16 * own_tiles, tokens, g);
      }
    }
    if (next < tokens) {
      copy_async_wait<0>();
      rotate_copied_rows<T>(key_of(next), rope, grid, next, next_rows, tokens, threads);
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

}  // namespace dinov3_ext
