// Launcher of the backward of rope_attention: which kernel, how many warps and which blocks, from lengths, head width
// and the architecture's shared memory alone.
#include "ops/rope_attention/rope_attention_backward_cuda.cuh"

#include <algorithm>

#include "core/architecture.h"
#include "core/launch.cuh"

namespace dinov3_ext {
namespace {

// One instantiation and the shape it is launched with.
struct Tiling {
  bool resident;
  int parts;  // 16-row parts of a warp
  int key_rows;
  int warps;  // that the instantiation is compiled for
};

constexpr int resident_tokens(int width) { return width == 64 ? 288 : 256; }
// Warps of the streaming kernels, per head width: each with 128 rows to a block.
constexpr int stream_parts(int width) { return width == 64 ? 2 : 1; }
constexpr int stream_warps(int width) { return width == 64 ? 4 : 8; }
constexpr int kStreamRows = 128, kStreamStep = 32;

Tiling choose_tiling(int width, int tokens, int architecture) {
  const int tiles = (tokens + 15) / 16, parts = tiles <= 9 ? 1 : 2;
  if (tokens <= resident_tokens(width)) {
    // 32 keys at a time halve the barriers; 16 where shared memory is small (there two parts of 32 keys would also
    // spill 72 bytes for sm_120, and the tensor cores are slow enough to hide the difference).
    const bool small = shared_bytes_per_block(architecture) < 128 * 1024;
    for (const int key_rows : {small && parts == 2 ? 16 : 32, 16}) {
      const int bytes = resident_shared_bytes(width, 16 * tiles, key_rows);
      if (bytes <= shared_bytes_per_block(architecture)) return {true, parts, key_rows, tiles <= 4 ? 4 : 9};
    }
  }
  return {false, stream_parts(width), kStreamStep, stream_warps(width)};
}

// Adds `group` to the plan of its launch; groups come longest first.
void add(BackwardPlan& plan, const SequenceGroup& group, int heads, int rows_of_block, int64_t& blocks) {
  const int tiles = (group.tokens + 15) / 16;
  const int row_blocks = (16 * tiles + rows_of_block - 1) / rows_of_block;
  plan.groups[plan.count++] = {group.first_sequence, group.first_token, uint32_t(blocks),
                               uint32_t(row_blocks), rows_of_block,     group.tokens};
  blocks += group.sequences * heads * row_blocks;
}

template <Element T, int Width>
struct Backward {
  const RopeAttentionBackward& args;
  void* stream;

  template <int MT, int KeyRows, int Warps>
  int resident(BackwardPlan& plan, int64_t blocks) const {
    const int tiles = plan.rows / 16;
    // With two parts to a warp 8 warps at least: they share out dV and dK in 8 or 16 units.
    plan.warps = std::max((tiles + MT - 1) / MT, MT == 2 ? 8 : 1);
    return launch<backward_resident<T, Width, MT, KeyRows, Warps>>(
        {.x = blocks, .threads = 32 * plan.warps, .shared_bytes = resident_shared_bytes(Width, plan.rows, KeyRows)},
        stream, args, plan);
  }

  int streaming(BackwardPlan& plan, int64_t blocks) const {
    constexpr int MT = stream_parts(Width), kWarps = stream_warps(Width);
    static_assert(16 * MT * kWarps == kStreamRows);
    plan.warps = kWarps;
    const int status = launch<backward_queries<T, Width, MT, kWarps, kStreamStep>>(
        {.x = blocks,
         .threads = 32 * kWarps,
         .shared_bytes = backward_queries_shared_bytes<Width, MT, kWarps, kStreamStep>()},
        stream, args, plan);
    if (status) return status;
    return launch<backward_keys<T, Width, MT, kWarps, kStreamStep>>(
        {.x = blocks,
         .threads = 32 * kWarps,
         .shared_bytes = backward_keys_shared_bytes<Width, MT, kWarps, kStreamStep>()},
        stream, args, plan);
  }

  int operator()() const {
    const RopePacked& packed = args.packed;
    // Longest first: the last blocks of a launch should be short ones.
    SequenceGroup groups[kMaxGroups];
    std::copy_n(packed.groups, packed.group_count, groups);
    std::stable_sort(groups, groups + packed.group_count,
                     [](const SequenceGroup& a, const SequenceGroup& b) { return a.tokens > b.tokens; });
    for (int first = 0; first < packed.group_count;) {
      const Tiling tiling = choose_tiling(Width, groups[first].tokens, packed.architecture);
      BackwardPlan plan{};
      plan.scale_log2 = args.scale * 1.4426950408889634f;
      plan.rows = (groups[first].tokens + 15) / 16 * 16;
      int64_t blocks = 0;
      for (; first < packed.group_count; ++first) {
        const SequenceGroup& group = groups[first];
        const Tiling other = choose_tiling(Width, group.tokens, packed.architecture);
        if (other.resident != tiling.resident || other.parts != tiling.parts || other.key_rows != tiling.key_rows ||
            other.warps != tiling.warps)
          break;
        int rows = (group.tokens + 15) / 16 * 16;
        if (!tiling.resident) {
          // Blocks of equal size rather than full ones and a rest.
          const int row_blocks = (rows + kStreamRows - 1) / kStreamRows, unit = 16 * tiling.parts;
          rows = ((rows + row_blocks - 1) / row_blocks + unit - 1) / unit * unit;
        }
        add(plan, group, packed.heads, rows, blocks);
      }
      const int status = run(tiling, plan, blocks);
      if (status) return status;
    }
    return 0;
  }

  int run(const Tiling& tiling, BackwardPlan& plan, int64_t blocks) const {
    constexpr int kPairWarps = (resident_tokens(Width) + 31) / 32;
    if (!tiling.resident) return streaming(plan, blocks);
    if (tiling.key_rows == 32) {
      if (tiling.parts == 2) return resident<2, 32, kPairWarps>(plan, blocks);
      return tiling.warps == 4 ? resident<1, 32, 4>(plan, blocks) : resident<1, 32, 9>(plan, blocks);
    }
    if (tiling.parts == 2) return resident<2, 16, kPairWarps>(plan, blocks);
    return resident<1, 16, 9>(plan, blocks);
  }
};

}  // namespace

bool rope_attention_backward_needs_rotated(const RopePacked& packed) {
  return std::any_of(packed.groups, packed.groups + packed.group_count, [&](const SequenceGroup& group) {
    return !choose_tiling(packed.head_width, group.tokens, packed.architecture).resident;
  });
}

int rope_attention_backward_cuda(const RopeAttentionBackward& args, void* stream) {
  if (args.rotated) {
    // Only the sequences that the streaming kernels serve.
    RopeRotate rotate{args.packed, args.qkv, args.stride, args.rotated, false};
    rotate.packed.group_count = int(
        std::remove_if(rotate.packed.groups, rotate.packed.groups + rotate.packed.group_count,
                       [&](const SequenceGroup& group) {
                         return choose_tiling(args.packed.head_width, group.tokens, args.packed.architecture).resident;
                       }) -
        rotate.packed.groups);
    const int status = rope_rotate_cuda(rotate, stream);
    if (status) return status;
  }
  const bool bfloat16 = args.packed.element == Element::bfloat16;
  if (args.packed.head_width == 64) {
    return bfloat16 ? Backward<Element::bfloat16, 64>{args, stream}() : Backward<Element::float16, 64>{args, stream}();
  }
  return bfloat16 ? Backward<Element::bfloat16, 128>{args, stream}() : Backward<Element::float16, 128>{args, stream}();
}

}  // namespace dinov3_ext
