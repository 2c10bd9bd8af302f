// Which kernel the backward of rope_attention takes for a length and with which tile: pure functions of head width,
// length and architecture; and what a launch tells its blocks.
#pragma once

#include "core/architecture.h"
#include "ops/rope_attention/rope_attention.h"

namespace dinov3_ext {

// One instantiation of a kernel, and the shape it is launched with for sequences of `rows` rows.
struct BackwardTiling {
  bool resident;     // whole sequences in shared memory; else streaming, on q and k that rope_rotate has turned
  int parts;         // 16-row parts of a warp
  int step;          // keys (queries) of one step
  int most_warps;    // that the kernel is compiled for
  bool extra_tile;   // resident: the last 16 rows are shared out to all warps
  int warps;         // of a block
  int rows;          // resident: of the sequence in shared memory; streaming: of a block
  int shared_bytes;  // of a block
  bool same_kernel(const BackwardTiling& other) const {
    return resident == other.resident && parts == other.parts && step == other.step && most_warps == other.most_warps &&
           extra_tile == other.extra_tile;
  }
};

// Bytes of shared memory of backward_resident: Q and G (rows each), K and V of `step` keys, P and dS (rows x step
// each); with an extra tile also the next K, that tile's dQ and the sums of two warps.
constexpr int resident_shared_bytes(int width, int rows, int step, bool extra_tile) {
  const int bytes = 2 * (2 * rows * width + 2 * step * width + rows * 2 * step);
  return extra_tile ? bytes + 2 * step * width + 4 * 16 * width + 2 * 32 * 16 : bytes;
}

// Of backward_queries and backward_keys: two tensors of the block's rows, two of `step` rows twice; lse and delta of
// backward_keys, twice.
constexpr int streaming_shared_bytes(int width, int rows, int step) {
  return 2 * width * (2 * rows + 2 * 2 * step) + 2 * 2 * step * 4;
}

inline constexpr int kStreamStep = 32;
constexpr int stream_parts(int width) { return width == 64 ? 2 : 1; }
constexpr int stream_warps(int width) { return width == 64 ? 4 : 8; }
// dQ fills the registers: 9 warps x 2 x 16 rows x 64 (more than 8 warps leave 168 registers a thread), 8 x 2 x 16 x
// 128.
constexpr int resident_warps(int width) { return width == 64 ? 9 : 8; }

inline BackwardTiling backward_tiling(int width, int tokens, int architecture) {
  const int tiles = (tokens + 15) / 16, parts = tiles <= 9 ? 1 : 2, room = shared_bytes_per_block(architecture);
  const bool extra_tile = width == 128 && tiles == 2 * resident_warps(width) + 1;
  if (tiles <= 2 * resident_warps(width) + extra_tile) {
    // 32 keys at a time halve the barriers; 16 for sequences that have no more, and where shared memory is small: with
    // two parts (32 keys spill for sm_120, and its tensor cores are slow enough to hide the difference) and at width
    // 128 (54 tokens: two blocks a processor instead of one). A block has no more warps than its sequences need, but 8
    // where a warp has two parts: they share out dV and dK in 8 or 16 units.
    const int most_warps = tiles <= 4 ? 4 : parts == 1 ? 9 : resident_warps(width);
    const int warps = parts == 1 ? tiles : tiles <= 16 || extra_tile ? 8 : 9;
    const bool narrow = tiles == 1 || (room < 128 * 1024 && (parts == 2 || width == 128));
    for (const int step : {narrow ? 16 : 32, 16}) {
      const int bytes = resident_shared_bytes(width, 16 * tiles, step, extra_tile);
      if (bytes <= room && (step == 32 || !extra_tile)) {
        return {true, parts, step, step == 32 || parts == 2 ? most_warps : 9, extra_tile, warps, 16 * tiles, bytes};
      }
    }
  }
  // Blocks of equal size rather than full ones and a rest.
  const int most = 16 * stream_parts(width) * stream_warps(width), blocks = (16 * tiles + most - 1) / most;
  const int unit = 16 * stream_parts(width), rows = ((16 * tiles + blocks - 1) / blocks + unit - 1) / unit * unit;
  return {false, stream_parts(width), kStreamStep, stream_warps(width),
          false, stream_warps(width), rows,        streaming_shared_bytes(width, most, kStreamStep)};
}

// ---- by value to the kernels ----

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

}  // namespace dinov3_ext
