// Which kernel a group of sequences takes and with which tile: pure functions of type, width, length and architecture.
#pragma once

#include "core/architecture.h"
#include "ops/rope_attention/rope_attention.h"

namespace dinov3_ext {

enum class AttentionPath : int {
  resident,   // keys and values of whole sequences in shared memory
  streaming,  // rope_rotate, then keys and values tile by tile
  composed,   // rope_rotate, then PyTorch's attention: Python's part
};

inline constexpr int kResidentBlocks = 3;      // at most, of a processor
inline constexpr int kResidentRows = 128;      // at least, of a block: two local crops of 54 tokens
inline constexpr int kShareBytes = 48;         // of a block, beside keys and values
inline constexpr int kStreamingKeys = 64;      // of one tile
inline constexpr int kStreamingQueries = 128;  // of one block

struct AttentionPlan {
  AttentionPath path;
  int rows;          // resident: of keys and of values in a block's shared memory; streaming: queries of a block
  int warps;         // of a block
  int shared_bytes;  // of a block
  int pairs;         // resident: (sequence, head) pairs of this length in one block; streaming: 1
};

// Rows of queries that a warp of the streaming kernel takes; head width 128 leaves registers for 16.
template <int Width>
inline constexpr int kStreamingRows = Width == 64 ? 32 : 16;

// Rows of queries that a warp of the resident kernel takes at a time. 32 halve the trips of keys and values through
// shared memory, which at 16 rows would be as busy as the tensor cores of sm_80 and sm_90. Consumer GPUs, whose tensor
// cores take four times as long, have room for one block only at 201 to 261 tokens: more warps count for more there
// (and 32 rows would spill on sm_120).
inline int resident_query_rows(int head_width, int architecture) {
  return head_width == 64 && shared_bytes_per_block(architecture) > 100 * 1024 ? 32 : 16;
}

// Warps of the resident kernel on a processor: at 168 registers a thread, or at 96.
constexpr int resident_warps(int head_width, int query_rows) { return head_width == 64 && query_rows == 16 ? 20 : 12; }

inline int round_to_16(int tokens) { return (tokens + 15) / 16 * 16; }

constexpr bool attention_has_kernel(Element element, int head_width) {
  return element != Element::float32 && (head_width == 64 || head_width == 128);
}

// The longest sequence whose keys and values one block can hold.
inline int resident_limit(int head_width, int architecture) {
  return (shared_bytes_per_block(architecture) - kShareBytes) / (4 * head_width) / 16 * 16;
}

// What a launch takes whose longest sequence has `longest` tokens, for its sequences of `tokens`.
inline AttentionPlan resident_plan(int head_width, int longest, int tokens, int architecture) {
  const int wanted = round_to_16(longest), rows = wanted < kResidentRows ? kResidentRows : wanted;
  const int bytes = 4 * head_width * rows + kShareBytes;
  const int step = resident_query_rows(head_width, architecture);
  const int units = rows / wanted * ((wanted + step - 1) / step);
  const int room = shared_bytes_per_processor(architecture) / (bytes + 1024);
  // Blocks of a processor share its warps; no more warps than there is work for in as many rounds. Of the numbers of
  // blocks the one that keeps most warps busy, in doubt more blocks: one loads while another computes.
  int warps = 1, best_blocks = 0, best_rounds = 1;
  for (int blocks = 1; blocks == 1 || (blocks <= room && blocks <= kResidentBlocks); ++blocks) {
    const int most = resident_warps(head_width, step) / blocks, rounds = (units + most - 1) / most;
    if (blocks * best_rounds < best_blocks * rounds) continue;
    best_blocks = blocks, best_rounds = rounds, warps = (units + rounds - 1) / rounds;
  }
  return {AttentionPath::resident, rows, warps, bytes, rows / round_to_16(tokens)};
}

inline AttentionPlan streaming_plan(int head_width) {
  return {AttentionPath::streaming, kStreamingQueries,
          kStreamingQueries / (head_width == 64 ? kStreamingRows<64> : kStreamingRows<128>),
          2 * 2 * kStreamingKeys * 2 * head_width, 1};
}

// The kernel of this package that serves sequences of `tokens`, alone in a launch.
inline AttentionPlan rope_attention_kernel(int head_width, int tokens, int architecture) {
  return tokens <= resident_limit(head_width, architecture) ? resident_plan(head_width, tokens, tokens, architecture)
                                                            : streaming_plan(head_width);
}

// Sequences of so many tokens and more take PyTorch's attention: from about 600 on attention is limited by arithmetic,
// and sm_90 and sm_100 have products (wgmma, tcgen05) that these kernels do not use.
inline int composed_tokens(int architecture) { return architecture >= 90 && architecture < 120 ? 600 : kMaxTokens + 1; }

// What dinov3_ext.rope_attention does.
inline AttentionPlan rope_attention_plan(Element element, int head_width, int tokens, int architecture) {
  const bool composed = !attention_has_kernel(element, head_width) || tokens >= composed_tokens(architecture);
  return composed ? AttentionPlan{AttentionPath::composed, 0, 0, 0, 0}
                  : rope_attention_kernel(head_width, tokens, architecture);
}

inline bool rope_attention_needs_rotated(const RopePacked& packed) {
  for (int i = 0; i < packed.group_count; ++i) {
    if (packed.groups[i].tokens > resident_limit(packed.head_width, packed.architecture)) return true;
  }
  return false;
}

}  // namespace dinov3_ext
