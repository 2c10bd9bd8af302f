// Tiles and workspace of the CUDA kernels of gram_loss: a function of the sizes and types alone.
#pragma once

#include <cstdint>

#include "ops/gram_loss/gram_loss.h"

namespace dinov3_ext {

// Per row of an image: four numbers of the student, two of the teacher (gram_loss_cuda.cuh says which).
inline constexpr int kGramRowFields = 6;

// Row numbers and grids are int; the column blocks of a gradient are a grid's second axis.
inline constexpr int64_t kGramMostPatches = int64_t(1) << 22, kGramMostWidth = 65535 * 64;

struct GramPlan {
  int tile;               // rows and columns of a similarity tile, 64 or 128
  int parts;              // 16-bit numbers that hold one feature: 1, or 2 where a feature is fp32
  int64_t blocks;         // tiles along one side
  int64_t tiles;          // of the lower triangle, blocks (blocks + 1) / 2
  int64_t packed_width;   // the width, filled up with zeros to a multiple of `tile`
  int64_t chunk;          // images in flight: the workspace below is theirs
  int64_t packed_bytes;   // (2 tensors, chunk, parts, patches, packed_width) 16 bits
  int64_t rows_bytes;     // (chunk, kGramRowFields, patches) fp32
  int64_t losses_bytes;   // (images, tiles) fp32: of all images
  int64_t along_bytes;    // (chunk, blocks, blocks tile) fp32, with the gradient
  int64_t entries_bytes;  // (chunk, tiles, parts, tile, tile) 16 bits, with the gradient: half of N x N

  int64_t workspace_bytes() const { return packed_bytes + rows_bytes + losses_bytes + along_bytes + entries_bytes; }
};

inline GramPlan gram_plan(int64_t images, int64_t patches, int64_t width, int parts, bool gradient) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto triangle = [](int64_t n) { return n * (n + 1) / 2; };
  const auto sections = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  GramPlan plan{};
  plan.parts = parts;
  // Tiles of 64 load twice as much per product and are taken where they save a fifth of the products or more.
  const int64_t small = divide_up(patches, 64), large = divide_up(patches, 128);
  plan.tile = 5 * triangle(small) <= 4 * 4 * triangle(large) ? 64 : 128;
  plan.blocks = plan.tile == 64 ? small : large;
  plan.tiles = triangle(plan.blocks);
  plan.packed_width = divide_up(width, plan.tile) * plan.tile;

  const int64_t packed = 2 * parts * patches * plan.packed_width * 2;
  const int64_t entries = plan.tiles * parts * plan.tile * plan.tile * 2;
  // Blocks for two rounds of a large GPU (a small tile fills a quarter of a processor); packed features of at most
  // 256 MiB. One image of 2048 patches or more is a chunk by itself.
  const int64_t wanted = plan.tile == 64 ? 1024 : 256, packed_limit = int64_t(256) << 20;
  const int64_t by_tiles = wanted / plan.tiles, by_bytes = packed_limit / packed;
  int64_t most = by_tiles < by_bytes ? by_tiles : by_bytes;
  if (most < 1) most = 1;
  plan.chunk = divide_up(images, divide_up(images, most));  // the chunks are equally large

  plan.packed_bytes = sections(plan.chunk * packed);
  plan.rows_bytes = sections(plan.chunk * kGramRowFields * patches * 4);
  plan.losses_bytes = sections(images * plan.tiles * 4);
  plan.along_bytes = gradient ? sections(plan.chunk * plan.blocks * plan.blocks * plan.tile * 4) : 0;
  plan.entries_bytes = gradient ? sections(plan.chunk * entries) : 0;
  return plan;
}

// Features of 16 bits are one number each; one fp32 tensor makes both tensors pairs (three times the products).
inline int gram_parts(const GramLoss& args) {
  return args.student.element == Element::float32 || args.teacher.element == Element::float32 ? 2 : 1;
}

inline GramPlan gram_plan(const GramLoss& args) {
  return gram_plan(args.images, args.patches, args.width, gram_parts(args), args.grad != nullptr);
}

}  // namespace dinov3_ext
