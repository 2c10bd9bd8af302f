// Launchers of rope_rotate and of the forward of rope_attention: which groups take which kernel, and how many blocks.
#include <algorithm>

#include "core/launch.cuh"
#include "ops/rope_attention/rope_attention_cuda.cuh"
#include "ops/rope_attention/rope_rotate_cuda.cuh"

namespace dinov3_ext {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Shares out the blocks of a launch, blocks_of(group) each; returns their number.
template <class BlocksOf>
int64_t share_out(const RopePacked& packed, GroupBlocks& blocks, BlocksOf blocks_of) {
  std::fill_n(blocks.last, kMaxGroups, INT64_MAX);
  int64_t last = 0;
  for (int i = 0; i < packed.group_count; ++i) blocks.last[i] = last += blocks_of(packed.groups[i]);
  return last;
}

// The groups that `keep` wants, the longest first: the blocks that take longest start first.
template <class Keep>
RopePacked chosen(RopePacked packed, Keep keep) {
  SequenceGroup* const end = std::copy_if(packed.groups, packed.groups + packed.group_count, packed.groups, keep);
  packed.group_count = int(end - packed.groups);
  std::stable_sort(packed.groups, end,
                   [](const SequenceGroup& a, const SequenceGroup& b) { return a.tokens > b.tokens; });
  return packed;
}

template <Element E, int N>
int rotate_in(const RopeRotate& args, void* stream) {
  GroupBlocks shares{};
  const int64_t blocks = share_out(args.packed, shares, [](const SequenceGroup& group) {
    return divide_up(group.sequences * group.tokens, kRotateWarps);
  });
  const Shape shape{.x = blocks, .threads = 32 * kRotateWarps};
  return args.inverse ? launch<rotate<E, N, true>>(shape, stream, args, shares)
                      : launch<rotate<E, N, false>>(shape, stream, args, shares);
}

template <Element E>
int rotate_as(const RopeRotate& args, void* stream) {
  constexpr int kVector = kPerVector<E>;
  const auto whole = [](int64_t elements) { return elements % kVector == 0; };
  const bool aligned = reinterpret_cast<uintptr_t>(args.input) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(args.output) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(args.packed.rope) % 16 == 0 && whole(args.packed.head_width / 4) &&
                       whole(args.stride.token) && whole(args.stride.part) && whole(args.stride.head);
  return aligned ? rotate_in<E, kVector>(args, stream) : rotate_in<E, 1>(args, stream);
}

template <Element E, int Width>
int attend_with(const RopeAttention& args, void* stream) {
  const int architecture = args.packed.architecture, limit = resident_limit(Width, architecture);
  if (rope_attention_needs_rotated(args.packed)) {
    RopeAttention longer = args;
    longer.packed = chosen(args.packed, [&](const SequenceGroup& group) { return group.tokens > limit; });
    const int rotated = rope_rotate_cuda({longer.packed, args.qkv, args.stride, args.rotated, false}, stream);
    if (rotated) return rotated;
    const AttentionPlan plan = streaming_plan(Width);
    GroupBlocks shares{};
    const int64_t blocks = share_out(longer.packed, shares, [&](const SequenceGroup& group) {
      return group.sequences * longer.packed.heads * divide_up(group.tokens, plan.rows);
    });
    const Shape shape{.x = blocks, .threads = 32 * plan.warps, .shared_bytes = plan.shared_bytes};
    if (const int status = launch<streaming_forward<E, Width>>(shape, stream, longer, shares)) return status;
  }
  RopeAttention shorter = args;
  shorter.packed = chosen(args.packed, [&](const SequenceGroup& group) { return group.tokens <= limit; });
  if (shorter.packed.group_count == 0) return 0;
  const int longest = shorter.packed.groups[0].tokens;
  const AttentionPlan plan = resident_plan(Width, longest, longest, architecture);
  ResidentShares shares{plan.rows, plan.warps, {}};
  const int64_t blocks = share_out(shorter.packed, shares.blocks, [&](const SequenceGroup& group) {
    return divide_up(group.sequences * args.packed.heads,
                     resident_plan(Width, longest, group.tokens, architecture).pairs);
  });
  const Shape shape{.x = blocks, .threads = 32 * plan.warps, .shared_bytes = plan.shared_bytes};
  if constexpr (Width == 64) {
    if (resident_query_rows(Width, architecture) == 32) {
      return launch<resident_forward<E, Width, 2>>(shape, stream, shorter, shares);
    }
  }
  return launch<resident_forward<E, Width, 1>>(shape, stream, shorter, shares);
}

}  // namespace

int rope_rotate_cuda(const RopeRotate& args, void* stream) {
  switch (args.packed.element) {
    case Element::float32: return rotate_as<Element::float32>(args, stream);
    case Element::bfloat16: return rotate_as<Element::bfloat16>(args, stream);
    case Element::float16: return rotate_as<Element::float16>(args, stream);
  }
  return 0;
}

int rope_attention_cuda(const RopeAttention& args, void* stream) {
  const bool brain = args.packed.element == Element::bfloat16;
  if (args.packed.head_width == 64) {
    return brain ? attend_with<Element::bfloat16, 64>(args, stream) : attend_with<Element::float16, 64>(args, stream);
  }
  return brain ? attend_with<Element::bfloat16, 128>(args, stream) : attend_with<Element::float16, 128>(args, stream);
}

}  // namespace dinov3_ext
