// Launcher of the backward of rope_attention: every group to the kernel that backward_tiling names, one launch for all
// groups of one kernel.
#include <algorithm>

#include "core/launch.cuh"
#include "ops/rope_attention/rope_attention_backward_resident.cuh"
#include "ops/rope_attention/rope_attention_backward_streaming.cuh"

namespace dinov3_ext {
namespace {

template <Element T, int Width>
struct Backward {
  const RopeAttentionBackward& args;
  void* stream;

  // Longest sequences first: the last blocks of a launch should be short ones.
  int operator()() const {
    SequenceGroup groups[kMaxGroups];
    const int count = args.packed.group_count;
    std::copy_n(args.packed.groups, count, groups);
    std::stable_sort(groups, groups + count,
                     [](const SequenceGroup& a, const SequenceGroup& b) { return a.tokens > b.tokens; });
    for (int first = 0; first < count;) {
      const BackwardTiling tiling = backward_tiling(Width, groups[first].tokens, args.packed.architecture);
      BackwardPlan plan{};
      plan.warps = tiling.warps, plan.rows = tiling.rows, plan.scale_log2 = args.scale * 1.4426950408889634f;
      int64_t blocks = 0;
      for (; first < count; ++first) {
        const SequenceGroup& group = groups[first];
        const BackwardTiling own = backward_tiling(Width, group.tokens, args.packed.architecture);
        if (!own.same_kernel(tiling)) break;
        const int row_blocks = (group.tokens + own.rows - 1) / own.rows;
        plan.groups[plan.count++] = {group.first_sequence, group.first_token, uint32_t(blocks),
                                     uint32_t(row_blocks), own.rows,          group.tokens};
        blocks += group.sequences * args.packed.heads * row_blocks;
      }
      if (const int status = run(tiling, plan, blocks)) return status;
    }
    return 0;
  }

  int run(const BackwardTiling& tiling, const BackwardPlan& plan, int64_t blocks) const {
    const auto start = [&]<auto Kernel>() {
      return launch<Kernel>({.x = blocks, .threads = 32 * tiling.warps, .shared_bytes = tiling.shared_bytes}, stream,
                            args, plan);
    };
    if (!tiling.resident) {
      constexpr int kParts = stream_parts(Width), kWarps = stream_warps(Width);
      const int status = start.template operator()<backward_queries<T, Width, kParts, kWarps, kStreamStep>>();
      return status ? status : start.template operator()<backward_keys<T, Width, kParts, kWarps, kStreamStep>>();
    }
    constexpr int kMost = resident_warps(Width);
    if constexpr (Width == 128) {
      if (tiling.extra_tile) return start.template operator()<backward_resident<T, Width, 2, 32, kMost, true>>();
    }
    if (tiling.parts == 2) {
      return tiling.step == 32 ? start.template operator()<backward_resident<T, Width, 2, 32, kMost, false>>()
                               : start.template operator()<backward_resident<T, Width, 2, 16, kMost, false>>();
    }
    if (tiling.step == 16) return start.template operator()<backward_resident<T, Width, 1, 16, 9, false>>();
    return tiling.most_warps == 4 ? start.template operator()<backward_resident<T, Width, 1, 32, 4, false>>()
                                  : start.template operator()<backward_resident<T, Width, 1, 32, 9, false>>();
  }
};

}  // namespace

bool rope_attention_backward_needs_rotated(const RopePacked& packed) {
  return std::any_of(packed.groups, packed.groups + packed.group_count, [&](const SequenceGroup& group) {
    return !backward_tiling(packed.head_width, group.tokens, packed.architecture).resident;
  });
}

int rope_attention_backward_cuda(const RopeAttentionBackward& args, void* stream) {
  RopePacked longer = args.packed;  // the sequences that stream, and so need q and k rotated
  const auto stays = [&](const SequenceGroup& group) {
    return backward_tiling(longer.head_width, group.tokens, longer.architecture).resident;
  };
  longer.group_count = int(std::remove_if(longer.groups, longer.groups + longer.group_count, stays) - longer.groups);
  if (longer.group_count) {
    const int status = rope_rotate_cuda({longer, args.qkv, args.stride, args.rotated, false}, stream);
    if (status) return status;
  }
  const bool bfloat16 = args.packed.element == Element::bfloat16;
  if (args.packed.head_width == 64) {
    return bfloat16 ? Backward<Element::bfloat16, 64>{args, stream}() : Backward<Element::float16, 64>{args, stream}();
  }
  return bfloat16 ? Backward<Element::bfloat16, 128>{args, stream}() : Backward<Element::float16, 128>{args, stream}();
}

}  // namespace dinov3_ext
