// Which group a block belongs to.
#pragma once

#include "core/primitives.cuh"
#include "ops/rope_attention/rope_attention.h"

namespace dinov3_ext {

// The blocks of a launch, shared out to its groups in order: group g ends before block last[g]. By value, and searched
// with constant indices: an indexed array in a kernel's parameters is copied to the stack.
struct GroupBlocks {
  int64_t last[kMaxGroups];  // INT64_MAX behind the last group
};

struct GroupBlock {
  SequenceGroup group;
  int64_t block;  // within the group
};

__device__ __forceinline__ GroupBlock group_of(const RopePacked& packed, const GroupBlocks& blocks) {
  const int64_t block = block_index<0>();
  int g = 0;
  int64_t first = 0;
#pragma unroll
  for (int i = 0; i < kMaxGroups; ++i) {
    if (block >= blocks.last[i]) g = i + 1, first = blocks.last[i];
  }
  return {packed.groups[g], block - first};
}

}  // namespace dinov3_ext
