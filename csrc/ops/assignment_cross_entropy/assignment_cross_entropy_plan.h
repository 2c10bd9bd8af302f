// How the CUDA kernels of assignment_cross_entropy cut their work: a function of the sizes alone.
#pragma once

#include <cstdint>

namespace dinov3_ext {

inline constexpr int kCrossEntropyThreads = 256;
// Of one block: images where C = A = 1; else one image, crops and views.
inline constexpr int kCrossEntropyImages = 4, kCrossEntropyCrops = 4, kCrossEntropyViews = 2;

// How the blocks share the work.
struct CrossEntropyRanges {
  int64_t ranges;      // of an image's columns
  int64_t columns;     // in a range: a multiple of kCrossEntropyThreads * 8
  int64_t crop_tiles;  // forward: blocks side by side for more crops and views than one block takes
  int64_t view_tiles;
};

struct CrossEntropyPlan {
  int64_t image_tiles;  // of several images where C = A = 1
  CrossEntropyRanges forward, backward;

  int64_t forward_blocks() const { return image_tiles * forward.ranges * forward.crop_tiles * forward.view_tiles; }
  int64_t backward_blocks() const { return image_tiles * backward.ranges; }
};

inline CrossEntropyPlan cross_entropy_plan(int64_t crops, int64_t views, int64_t images, int64_t prototypes) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  // Some 1024 blocks, enough to fill a large GPU, each with at least 4096 columns (two steps of 8 for every thread),
  // which keep the sums over the block small beside the reading. blocks: those without ranges.
  const auto ranges_of = [&](int64_t blocks, int64_t crop_tiles, int64_t view_tiles) {
    const int64_t wanted = divide_up(1024, blocks < 1 ? 1 : blocks), most = divide_up(prototypes, 4096);
    const int64_t ranges = wanted < most ? wanted : most, step = kCrossEntropyThreads * 8;
    const int64_t columns = divide_up(divide_up(prototypes, ranges), step) * step;
    return CrossEntropyRanges{divide_up(prototypes, columns), columns, crop_tiles, view_tiles};
  };
  CrossEntropyPlan plan{};
  plan.image_tiles = crops == 1 && views == 1 ? divide_up(images, kCrossEntropyImages) : images;
  const int64_t crop_tiles = divide_up(crops, kCrossEntropyCrops), view_tiles = divide_up(views, kCrossEntropyViews);
  plan.forward = ranges_of(plan.image_tiles * crop_tiles * view_tiles, crop_tiles, view_tiles);
  plan.backward = ranges_of(plan.image_tiles, 1, 1);
  return plan;
}

}  // namespace dinov3_ext
