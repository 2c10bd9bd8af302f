// Forward of rope_attention on tensor cores (mma.sync), bf16 and fp16, head widths 64 and 128.
//
// resident_forward: a block holds the keys and values of whole sequences, so that q, k, v are read once and out written
// once: 8 bytes per element and the row sums. Sequences are padded to 16 rows and no further (54, 201 and 261 tokens
// become 64, 208 and 272). A block has room for `rows` rows, as many as the longest sequence of the launch needs; it
// takes several (sequence, head) pairs of a shorter group, so that one launch serves mixed lengths. Keys are rotated
// once, in place, by the thread that copied them; queries in registers. On sm_80, 90 and 100 warps take 32 rows of
// queries at a time (E = 64): with 16, keys and values (272 rows: 17 times 70 KB) would cross shared memory for as long
// as the 139 KB of the pair take from DRAM (sm_90: 9 thousand clocks either), with 32 half of that.
//
// streaming_forward: any length, queries and keys rotated before (rope_rotate): 64 keys and values at a time, double
// buffered, 128 queries to a block.
//
// Softmax in one pass over the keys, 32 at a time, in units of log2, the scale inside the multiply-add. The maximum
// that is subtracted may be stale by up to kSlack: weights then reach 2^8 instead of 1, which neither bf16, fp16 nor
// fp32 sums mind, and sums and outputs are hardly ever rescaled after the first keys.
#pragma once

#include <cmath>

#include "core/rope.cuh"
#include "core/rows.cuh"
#include "core/tile.cuh"
#include "ops/rope_attention/rope_attention_plan.h"
#include "ops/rope_attention/rope_groups.cuh"

namespace dinov3_ext {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kSlack = 8.f;  // units of log2
inline constexpr int kStepKeys = 32;  // of one softmax step: 64 would leave two blocks of four warps to a processor

__device__ __forceinline__ int padded(int tokens) { return (tokens + 15) & ~15; }

// Running softmax of 16 MT queries; row [m][half] of this lane: 16 m + 8 half + lane / 4.
template <int MT, int Width>
struct Running {
  float out[MT][Width / 8][4];
  float maximum[MT][2];  // of the scores, stale by at most kSlack
  float sum[MT][2];      // this lane's share
};

template <int MT, int Width>
__device__ __forceinline__ void clear(Running<MT, Width>& running) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      running.maximum[m][half] = -1e30f;  // not -infinity: differences stay numbers
      running.sum[m][half] = 0.f;
    }
#pragma unroll
    for (int n = 0; n < Width / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) running.out[m][n][i] = 0.f;
    }
  }
}

// Takes the maximum of each row up to that of `score` where any row of the warp outgrew the slack.
template <int MT, int NT, int Width>
__device__ __forceinline__ void raise_maxima(Running<MT, Width>& running, const float (&score)[MT][NT][4],
                                             float factor) {
  float highest[MT][2];
  bool outgrown = false;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float value = fmaxf(score[m][0][2 * half], score[m][0][2 * half + 1]);
#pragma unroll
      for (int n = 1; n < NT; ++n) value = fmaxf(value, fmaxf(score[m][n][2 * half], score[m][n][2 * half + 1]));
      value = fmaxf(value, shuffle_xor(value, 1));
      value = fmaxf(value, shuffle_xor(value, 2));
      highest[m][half] = fmaxf(running.maximum[m][half], value);
      outgrown |= (highest[m][half] - running.maximum[m][half]) * factor > kSlack;
    }
  }
  if (!any_lane(outgrown)) return;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float rescale = exp2_approx((running.maximum[m][half] - highest[m][half]) * factor);
      running.maximum[m][half] = highest[m][half];
      running.sum[m][half] *= rescale;
#pragma unroll
      for (int n = 0; n < Width / 8; ++n) {
        running.out[m][n][2 * half] *= rescale;
        running.out[m][n][2 * half + 1] *= rescale;
      }
    }
  }
}

// The next 8 NT keys and values, rows row .. of both tiles; the first `valid` of them exist (at least one of each 16).
// factor: scale in units of log2.
template <Element E, int NT, int MT, int Width>
__device__ __forceinline__ void attend(Running<MT, Width>& running, const uint32_t (&query)[MT][Width / 16][4],
                                       Tile<Width> keys, Tile<Width> values, int row, int valid, float factor) {
  float score[MT][NT][4] = {};
  product_with_rows<E>(score, query, keys, row, 0);
  if (valid < 8 * NT) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool masked = accumulator_column(n, i) >= valid;
#pragma unroll
        for (int m = 0; m < MT; ++m) score[m][n][i] = masked ? -INFINITY : score[m][n][i];
      }
    }
  }
  raise_maxima(running, score, factor);
  uint32_t weight[MT][NT / 2][4];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float shift = running.maximum[m][half] * factor;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          score[m][n][i] = exp2_approx(fmaf(score[m][n][i], factor, -shift));
          running.sum[m][half] += score[m][n][i];
        }
      }
    }
    round_to_left<E>(weight[m], score[m]);
  }
  product_with_columns<E>(running.out, weight, values, row, 0);
}

// Rows row .. row + keys - 1 of both tiles.
template <Element E, int MT, int Width>
__device__ __forceinline__ void attend_all(Running<MT, Width>& running, const uint32_t (&query)[MT][Width / 16][4],
                                           Tile<Width> keys, Tile<Width> values, int row, int valid, float factor) {
  int done = 0;
  for (; done + kStepKeys <= padded(valid); done += kStepKeys) {
    attend<E, kStepKeys / 8>(running, query, keys, values, row + done, valid - done, factor);
  }
  static_assert(kStepKeys == 32);
  if (done < valid) attend<E, 2>(running, query, keys, values, row + done, valid - done, factor);
}

// Divides by the sums and stores: out row-major with `stride`, lse of neighbouring queries together.
template <Element E, int MT, int Width>
__device__ __forceinline__ void finish(const Running<MT, Width>& running, uint16_t* out, int64_t stride, float* lse,
                                       int valid_rows, float factor) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = running.sum[m][half];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      inverse[half] = reciprocal(sum);
      const int row = 16 * m + 8 * half + (lane_index() >> 2);
      if (row < valid_rows && (lane_index() & 3) == 0) {
        store_global(lse + row, fmaf(running.maximum[m][half], factor, log2_approx(sum)));
      }
    }
    store_accumulator_rows<E>(out + 16 * m * stride, stride, valid_rows - 16 * m, running.out[m], inverse);
  }
}

// ---- keys and values resident
// ----------------------------------------------------------------------------------------

// How the blocks of a launch are shared out, in the order of the groups.
struct ResidentShares {
  int rows;   // of keys, and of values, in a block
  int warps;  // of a block
  GroupBlocks blocks;
};

// What a block works on: `pairs` neighbouring (sequence, head) pairs of one group. A copy in shared memory spares ten
// registers through the main loop.
struct alignas(16) Share {
  int64_t first_token;  // of the sequence of the first pair
  int tokens, pairs;
  int first_sequence;  // in the table: of the first pair
  int first_head;
  int units;  // of a pair: each kQueryRows of queries, the last perhaps 16
  int heads;

  __device__ __forceinline__ int rows() const { return padded(tokens); }
};

__device__ __forceinline__ Share share_of(const RopePacked& packed, const ResidentShares& shares, int query_rows) {
  const GroupBlock at = group_of(packed, shares.blocks);
  const int tokens = at.group.tokens, most = shares.rows / padded(tokens);
  const int64_t first = at.block * most, left = at.group.sequences * packed.heads - first;
  const int64_t sequence = first / packed.heads;
  return {at.group.first_token + sequence * tokens,
          tokens,
          left < most ? int(left) : most,
          int(at.group.first_sequence + sequence),
          int(first - sequence * packed.heads),
          (padded(tokens) + query_rows - 1) / query_rows,
          packed.heads};
}

__device__ __forceinline__ void store_share(uint32_t to, const Share& share) {
  store_shared(to, reinterpret_cast<const uint4&>(share));
  store_shared(to + 16, reinterpret_cast<const uint4*>(&share)[1]);
}
__device__ __forceinline__ Share load_share(uint32_t from) {
  Share share;
  reinterpret_cast<uint4&>(share) = load_shared<uint4>(from);
  reinterpret_cast<uint4*>(&share)[1] = load_shared<uint4>(from + 16);
  return share;
}

// One (sequence, head) pair of a share.
struct Pair {
  int64_t token;  // the first of its sequence
  int sequence, head;
};

__device__ __forceinline__ Pair pair_of(const Share& share, int number) {
  int head = share.first_head + number, further = 0;
  if (head >= share.heads) further = head / share.heads, head -= further * share.heads;
  return {share.first_token + int64_t(further) * share.tokens, share.first_sequence + further, head};
}

// Which chunks of a row a thread copies and rotates: `chunk` and chunk + Width / 16. Eight neighbouring lanes touch
// eight different chunk positions (at E = 64 of rows 4 apart), so that no two meet in a bank.
template <int Width>
struct KeyCopy {
  static constexpr int kChunkPairs = Width / 16;  // of a row
  static constexpr int kRows = 32 / kChunkPairs;  // that a warp takes at a time
  static_assert(kChunkPairs == 4 || kChunkPairs == 8);

  static __device__ __forceinline__ int chunk() { return lane_index() % kChunkPairs; }
  static __device__ __forceinline__ int row() {
    const int eighth = lane_index() >> 3;
    return kChunkPairs == 8 ? eighth : eighth + (lane_index() & 4);
  }
  // Calls visit(number of the pair, row) for this thread's rows of all pairs, kRows a warp, warp after warp.
  template <class Visit>
  static __device__ __forceinline__ void for_each_row(const Share& share, int warps, Visit visit) {
    const int strips = share.rows() / kRows;
    int strip = warp_index();
    for (int number = 0; number < share.pairs; ++number) {
      for (; strip < strips; strip += warps) visit(number, strip * kRows + row());
      strip -= strips;
    }
  }
};

// Keys (part 1) or values (part 2) of a share; rows behind the end of a sequence become zero: 0 times NaN is NaN.
template <int Width>
__device__ __forceinline__ void copy_part(Tile<Width> to, const RopeAttention& args, const Share& share, int warps,
                                          int part) {
  using Copy = KeyCopy<Width>;
  Copy::for_each_row(share, warps, [&](int number, int row) {
    const Pair pair = pair_of(share, number);
    const bool valid = row < share.tokens;
    const uint16_t* from = static_cast<const uint16_t*>(args.qkv) +
                           (pair.token + (valid ? row : 0)) * args.stride.token + part * args.stride.part +
                           pair.head * args.stride.head + 8 * Copy::chunk();
    const int at = number * share.rows() + row;
    copy_async(to.address(at, Copy::chunk()), from, valid);
    copy_async(to.address(at, Copy::chunk() + Copy::kChunkPairs), from + Width / 2, valid);
  });
  copy_async_commit();
}

// Rotates in place the keys that this thread copied.
template <Element E, int Width>
__device__ __forceinline__ void rotate_keys(Tile<Width> keys, const RopePacked& packed, const Share& share, int warps) {
  using Copy = KeyCopy<Width>;
  int known = -1;
  RopeGrid grid{};
  Copy::for_each_row(share, warps, [&](int number, int row) {
    if (number != known) grid = load_rope_grid(packed.sequences, pair_of(share, number).sequence), known = number;
    const RopeRows angles = rope_rows(grid, row, share.tokens);
    const int at = number * share.rows() + row;
    const uint32_t low = keys.address(at, Copy::chunk()), high = keys.address(at, Copy::chunk() + Copy::kChunkPairs);
    uint4 x = load_shared<uint4>(low), y = load_shared<uint4>(high);
    rotate_chunks<E, false, Width>(x, y, packed.rope, angles, Copy::chunk());
    store_shared(low, x), store_shared(high, y);
  });
}

// Queries of unit `unit` of a share, rotated.
template <Element E, int MT, int Width>
__device__ __forceinline__ void load_queries(uint32_t (&query)[MT][Width / 16][4], const RopeAttention& args,
                                             const Share& share, int unit) {
  const Pair pair = pair_of(share, unit / share.units);
  const int row = unit % share.units * 16 * MT;
  const uint16_t* from =
      static_cast<const uint16_t*>(args.qkv) + (pair.token + row) * args.stride.token + pair.head * args.stride.head;
  load_left_rows(query, from, args.stride.token, share.tokens - row);
  const RopeGrid grid = load_rope_grid(args.packed.sequences, pair.sequence);
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    const int upper = row + 16 * m + (lane_index() >> 2);
    rotate_left<E, false>(query[m], args.packed.rope, rope_rows(grid, upper, share.tokens),
                          rope_rows(grid, upper + 8, share.tokens));
  }
}

// The first MT * 16 queries of a unit against all keys of their pair.
template <Element E, int MT, int KMT, int Width>
__device__ __forceinline__ void attend_unit(const uint32_t (&query)[KMT][Width / 16][4], Tile<Width> keys,
                                            Tile<Width> values, const RopeAttention& args, uint32_t shared_share,
                                            int unit) {
  uint32_t part[MT][Width / 16][4];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int k = 0; k < Width / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) part[m][k][i] = query[m][k][i];
    }
  }
  const float factor = args.scale * kLog2E;
  Running<MT, Width> running;
  clear(running);
  {
    const Share share = load_share(shared_share);
    attend_all<E>(running, part, keys, values, unit / share.units * share.rows(), share.tokens, factor);
  }
  const Share share = load_share(shared_share);
  const Pair pair = pair_of(share, unit / share.units);
  const int row = unit % share.units * 16 * KMT;
  const int64_t token = pair.token + row;
  finish<E>(running, static_cast<uint16_t*>(args.out) + (token * share.heads + pair.head) * Width,
            int64_t(share.heads) * Width, args.lse + pair.head * args.packed.tokens + token, share.tokens - row,
            factor);
}

// Whether no more than 16 queries are left for this unit of 32.
__device__ __forceinline__ bool half_unit(const Share& share, int unit) {
  return share.tokens - unit % share.units * 32 <= 16;
}

// MT: 16-row tiles of a unit of queries.
template <Element E, int Width, int MT>
__global__ void __launch_bounds__(32 * resident_warps(Width, 16 * MT))
    resident_forward(RopeAttention args, ResidentShares shares) {
  const Tile<Width> keys{shared_base()}, values{shared_base() + uint32_t(shares.rows * 2 * Width)};
  const uint32_t shared_share = shared_base() + uint32_t(shares.rows * 4 * Width);
  uint32_t query[MT][Width / 16][4];
  int unit = shuffle(warp_index(), 0), units;  // so that the compiler, too, knows them to be the same for all lanes
  {
    const Share share = share_of(args.packed, shares, 16 * MT);
    units = share.pairs * share.units;
    copy_part(keys, args, share, shares.warps, 1);
    copy_part(values, args, share, shares.warps, 2);
    if (unit < units) load_queries<E, MT, Width>(query, args, share, unit);  // while keys and values are on their way
    copy_async_wait<1>();
    rotate_keys<E>(keys, args.packed, share, shares.warps);
    if (thread_index() == 0) store_share(shared_share, share);
    copy_async_wait<0>();
    block_barrier();
  }
  while (unit < units) {
    if (MT == 2 && half_unit(load_share(shared_share), unit)) {
      attend_unit<E, 1>(query, keys, values, args, shared_share, unit);
    } else {
      attend_unit<E, MT>(query, keys, values, args, shared_share, unit);
    }
    unit += shares.warps;
    if (unit < units) load_queries<E, MT, Width>(query, args, load_share(shared_share), unit);
  }
}

// ---- keys and values streaming past
// ----------------------------------------------------------------------------------------

// A block: kStreamingQueries queries of one (sequence, head) pair, its neighbours the other queries of the same pair.
template <Element E, int Width>
__global__ void __launch_bounds__(32 * kStreamingQueries / kStreamingRows<Width>)
    streaming_forward(RopeAttention args, GroupBlocks blocks) {
  constexpr int kThreads = 32 * kStreamingQueries / kStreamingRows<Width>, kMT = kStreamingRows<Width> / 16;
  constexpr uint32_t kTile = kStreamingKeys * 2 * Width;  // bytes
  const RopePacked& packed = args.packed;
  const GroupBlock at = group_of(packed, blocks);
  const int tokens = at.group.tokens;
  const int query_blocks = (tokens + kStreamingQueries - 1) / kStreamingQueries;
  const int64_t number = at.block / query_blocks, sequence = number / packed.heads;
  const int head = int(number - sequence * packed.heads);
  const int warp = shuffle(warp_index(), 0);  // so that the compiler, too, knows it to be the same for all lanes
  const int row = int(at.block - number * query_blocks) * kStreamingQueries + warp * 16 * kMT;
  const int64_t token = at.group.first_token + sequence * tokens;

  const int64_t rotated_stride = int64_t(2) * packed.heads * Width;
  const uint16_t* const queries = static_cast<const uint16_t*>(args.rotated) + token * rotated_stride + head * Width;
  const uint16_t* const keys = queries + packed.heads * Width;
  const uint16_t* const values = static_cast<const uint16_t*>(args.qkv) + token * args.stride.token +
                                 2 * args.stride.part + head * args.stride.head;
  auto key_tile = [](int tile) { return Tile<Width>{shared_base() + (tile & 1) * 2 * kTile}; };
  auto value_tile = [](int tile) { return Tile<Width>{shared_base() + (tile & 1) * 2 * kTile + kTile}; };
  auto copy = [&](int tile) {
    const int first = tile * kStreamingKeys;
    copy_tile_async<kStreamingKeys, kThreads>(key_tile(tile), keys + first * rotated_stride, rotated_stride,
                                              tokens - first);
    copy_tile_async<kStreamingKeys, kThreads>(value_tile(tile), values + first * args.stride.token, args.stride.token,
                                              tokens - first);
    copy_async_commit();
  };

  copy(0);
  uint32_t query[kMT][Width / 16][4];
  load_left_rows(query, queries + row * rotated_stride, rotated_stride, tokens - row);
  const float factor = args.scale * kLog2E;
  Running<kMT, Width> running;
  clear(running);
  const int tiles = (tokens + kStreamingKeys - 1) / kStreamingKeys;
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<0>();
    block_barrier();  // the tile is there, and nobody reads the one before
    if (tile + 1 < tiles) copy(tile + 1);
    if (row >= tokens) continue;
    const int left = tokens - tile * kStreamingKeys;
    attend_all<E>(running, query, key_tile(tile), value_tile(tile), 0, left < kStreamingKeys ? left : kStreamingKeys,
                  factor);
  }
  if (row >= tokens) return;
  finish<E>(running, static_cast<uint16_t*>(args.out) + ((token + row) * packed.heads + head) * Width,
            int64_t(packed.heads) * Width, args.lse + head * packed.tokens + token + row, tokens - row, factor);
}

}  // namespace dinov3_ext
