// How the CUDA kernels of sinkhorn_knopp cut their work: a function of shape, type and alignment alone.
#pragma once

#include <cstdint>

#include "ops/sinkhorn_knopp/sinkhorn_knopp.h"

namespace dinov3_ext {

inline constexpr int kSinkhornThreads = 256;
inline constexpr int kSinkhornWarps = kSinkhornThreads / 32;
inline constexpr int kSinkhornRows = 4;  // of a block of the row kernel

struct SinkhornPlan {
  // A whole iteration in one reading: a block takes all rows of `columns` neighbouring columns.
  int lanes;         // that share a row of the tile: 32, 8 or 4, of 16 bytes each; or 32 of one element
  bool kept;         // the tile stays in shared memory; else its second reading comes from L2, where it fits that
  int64_t columns;   // of a tile
  int64_t tiles;     // blocks
  int shared_bytes;  // of a block

  // The steps between exchanges of several ranks.
  int64_t splits;  // of the rows, in steps over columns
  int64_t ranges;  // of the columns, in steps over rows
};

// width: elements of one load, 16 bytes or one element (rows that are not aligned).
inline SinkhornPlan sinkhorn_plan(int64_t rows, int64_t prototypes, Element element, int width) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto clamp = [](int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; };
  SinkhornPlan plan{};

  // Two blocks to a multiprocessor of sm_80 and sm_90, one where nothing else is possible (99 KB: sm_120). Narrower
  // tiles where wide ones would not make 256 blocks, but whole lines of 128 bytes; 64 bytes where rows are many.
  constexpr int64_t kTwoBlocks = 81 << 10, kOneBlock = 96 << 10;
  const auto bytes_of = [&](int lanes, bool kept) {  // maxima and sums of 8 warps, potentials, elements
    const int64_t columns = int64_t(lanes) * width, size = element == Element::float32 ? 4 : 2;
    return (2 * kSinkhornWarps + 1) * columns * 4 + (kept ? rows * columns * size : 0);
  };
  const auto fits = [&](int lanes, int64_t most) { return bytes_of(lanes, true) <= most; };
  if (width == 1) {
    plan.lanes = 32;
    plan.kept = fits(32, kOneBlock);
  } else {
    const bool wide = divide_up(prototypes, 32 * width) >= 256 && fits(32, kTwoBlocks);
    plan.lanes = wide ? 32 : fits(8, kTwoBlocks) ? 8 : 4;
    plan.kept = plan.lanes > 4 || fits(4, kOneBlock);
  }
  plan.columns = int64_t(plan.lanes) * width;
  plan.tiles = divide_up(prototypes, plan.columns);
  plan.shared_bytes = int(bytes_of(plan.lanes, plan.kept));

  // Some 1024 blocks of 256 columns, and at least 128 rows in each, so that partial results stay small beside the
  // logits.
  const int64_t many = 1024 / divide_up(prototypes, 256);
  plan.splits = clamp(divide_up(rows, 128), 1, clamp(many, 1, 64));
  // Some 1024 blocks of rows, and at least 4096 columns in each, so that the sums over a block stay small.
  plan.ranges = clamp(divide_up(1024, clamp(divide_up(rows, kSinkhornRows), 1, 1024)), 1, divide_up(prototypes, 4096));
  return plan;
}

}  // namespace dinov3_ext
