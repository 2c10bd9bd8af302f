// rope_attention on the CPU: the walk over sequences and heads, the forward, and the rotation alone.
//
// Forward of one sequence and head. Kept for the whole sequence: R(k) as rows, v transposed. Then, for 64 queries at a
// time and chunks of at most 160 keys (40 KB of scores, which stay in the first caches):
//   S^T = R(k) R(q)^T,  P^T = softmax down the keys,  out^T += v^T P^T
// so nothing of size tokens x tokens exists, and q, k and v are read once, out is written once.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>

#include "core/cpu_amx.h"
#include "ops/rope_attention/rope_attention_cpu.h"

namespace dinov3_ext {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int64_t kQueries = 64;      // of one block
constexpr int64_t kKeysAtOnce = 160;  // of one chunk, at most

// The chunks of a sequence's keys: all but the last of `keys` keys, whole lines.
struct Chunks {
  int64_t count, keys;
  Chunks(const Sizes& sizes, int64_t most)
      : count(divide_up(sizes.padded, most)), keys(round_up(divide_up(sizes.padded, count), sizes.line_rows)) {
    count = divide_up(sizes.tokens, keys);
  }
};

struct ForwardBuffers {
  char *keys, *values, *rows, *stacked, *queries, *scores, *weights, *out;
  int64_t bytes;
  ForwardBuffers(const Sizes& sizes, char* scratch) {
    Blocks blocks(scratch);
    const int64_t chunk = Chunks(sizes, kKeysAtOnce).keys, panels = kQueries / 16;
    keys = blocks.take(sizes.padded * sizes.row_words * 4);
    values = blocks.take(sizes.lines * sizes.width * kLine);
    rows = blocks.take(kQueries * sizes.row_words * 4);
    stacked = blocks.take(sizes.width / 16 * 16 * kLine);
    queries = blocks.take(panels * sizes.row_words * kLine);
    scores = blocks.take(panels * chunk * kLine);
    weights = sizes.pair == 1 ? scores : blocks.take(panels * chunk / sizes.pair * kLine);
    out = blocks.take(panels * sizes.width * kLine);
    bytes = blocks.used();
  }
};

const char* element_at(const void* base, const RopePacked& packed, int64_t index) {
  return static_cast<const char*>(base) + index * element_bytes(packed.element);
}

void forward_of_sequence(const void* context, const AttentionKernels& kernels, const SequenceOfHead& sequence,
                         char* scratch) {
  const RopeAttention& args = *static_cast<const RopeAttention*>(context);
  const RopePacked& packed = args.packed;
  const Sizes sizes(kernels, sequence.tokens, packed.head_width);
  const ForwardBuffers buffers(sizes, scratch);
  const Chunks chunks(sizes, kKeysAtOnce);
  const int64_t size = element_bytes(packed.element), token_bytes = args.stride.token * size;
  const char* query =
      element_at(args.qkv, packed, sequence.first_token * args.stride.token + sequence.head * args.stride.head);
  const char* key = query + args.stride.part * size;
  const char* value = key + args.stride.part * size;
  kernels.read_rows({packed.element, key, token_bytes, sizes.width, 0, sizes.tokens, sizes.padded, &sequence.turn,
                     buffers.keys, sizes.row_words});
  for (int64_t line = 0; line < sizes.lines; ++line) {
    const int64_t first = line * sizes.line_rows;
    kernels.read_rows({packed.element, value + first * token_bytes, token_bytes, sizes.width, first,
                       std::min(sizes.line_rows, sizes.tokens - first), sizes.line_rows, nullptr, buffers.rows,
                       sizes.row_words});
    kernels.stack({buffers.rows, sizes.row_words * 4, buffers.stacked, 16 * kLine, sizes.width / 16});
    kernels.transpose({buffers.stacked, kLine, 16 * kLine, buffers.values + line * sizes.width * kLine, kLine,
                       16 * kLine, sizes.width / 16});
  }
  const int64_t out_row = packed.heads * sizes.width * size;
  char* out = static_cast<char*>(args.out) + sequence.first_token * out_row + sequence.head * sizes.width * size;
  float* lse = args.lse + sequence.head * packed.tokens + sequence.first_token;
  for (int64_t first = 0; first < sizes.tokens; first += kQueries) {
    const int64_t queries = std::min(kQueries, sizes.tokens - first), panels = divide_up(queries, 16);
    kernels.read_rows({packed.element, query + first * token_bytes, token_bytes, sizes.width, first, queries,
                       panels * 16, &sequence.turn, buffers.rows, sizes.row_words});
    for (int64_t panel = 0; panel < panels; ++panel) {
      kernels.transpose({buffers.rows + panel * 16 * sizes.row_words * 4, sizes.row_words * 4, kLine,
                         buffers.queries + panel * sizes.row_words * kLine, kLine, 16 * kLine, sizes.row_words / 16});
    }
    alignas(kLine) float maxima[kQueries], sums[kQueries];
    const int64_t out_panel = sizes.width * kLine, weights_panel = chunks.keys / sizes.pair * kLine;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const int64_t first_key = chunk * chunks.keys, keys = std::min(chunks.keys, sizes.tokens - first_key);
      const int64_t words = round_up(divide_up(keys, sizes.pair), kernels.word_step);
      kernels.multiply({buffers.keys + first_key * sizes.row_words * 4, sizes.row_words * 4, kLine, buffers.queries,
                        sizes.row_words * kLine, buffers.scores, chunks.keys * kLine, round_up(keys, kernels.row_step),
                        panels, sizes.row_words, false});
      kernels.softmax({buffers.scores, chunks.keys * kLine, buffers.weights, weights_panel, panels, keys, words,
                       args.scale * kLog2E, chunk == 0, maxima, sums, buffers.out, out_panel, sizes.width});
      kernels.multiply({buffers.values + first_key / sizes.line_rows * sizes.width * kLine, kLine, sizes.width * kLine,
                        buffers.weights, weights_panel, buffers.out, out_panel, sizes.width, panels, words, chunk > 0});
    }
    for (int64_t query = 0; query < queries; ++query) {
      lse[first + query] = maxima[query] * (args.scale * kLog2E) + std::log2(sums[query]);
      sums[query] = 1.f / sums[query];
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t row = first + panel * 16;
      kernels.transpose(
          {buffers.out + panel * out_panel, kLine, 16 * kLine, buffers.stacked, kLine, 16 * kLine, sizes.width / 16});
      kernels.write_rows({buffers.stacked, 16 * kLine, 0.f, sums + panel * 16, packed.element, sizes.width, row,
                          std::min<int64_t>(16, sizes.tokens - row), nullptr, false, out + row * out_row, out_row});
    }
  }
}

int64_t forward_scratch(const AttentionKernels& kernels, int64_t tokens, int64_t width) {
  return ForwardBuffers(Sizes(kernels, tokens, width), nullptr).bytes;
}

// ---- the walk -------------------------------------------------------------------------------------------------------

struct WalkOverSequences {
  const RopePacked& packed;
  AttentionTask task;
  const AttentionKernels& kernels;
  const void* context;
  int64_t scratch;
  int32_t order[kMaxGroups];  // groups, longest sequences first
  int64_t tasks;
  std::atomic<int64_t> next{0};

  SequenceOfHead sequence_of(int64_t number) const {
    const int64_t head = number % packed.heads;
    int64_t sequence = number / packed.heads;
    const int32_t* group_number = order;
    while (sequence >= packed.groups[*group_number].sequences) sequence -= packed.groups[*group_number++].sequences;
    const SequenceGroup& group = packed.groups[*group_number];
    const int32_t* row = packed.sequences + (group.first_sequence + sequence) * kSequenceColumns;
    return {head,
            group.first_token + sequence * group.tokens,
            group.tokens,
            {packed.rope, packed.head_width / 4, row[2], row[3], row[4], std::max(row[5], 1)}};
  }
  void work(char* memory) {
    for (int64_t number = next++; number < tasks; number = next++) {
      task(context, kernels, sequence_of(number), memory);
    }
  }
};

}  // namespace

void for_each_sequence_and_head(const RopePacked& packed, AttentionTask task, AttentionScratch scratch,
                                const void* context, ParallelFor parallel_for) {
  const AttentionKernels& kernels = attention_kernels(packed.element);
  WalkOverSequences walk{packed, task, kernels, context, 0, {}, 0};
  std::iota(walk.order, walk.order + packed.group_count, 0);
  std::stable_sort(walk.order, walk.order + packed.group_count,
                   [&](int32_t a, int32_t b) { return packed.groups[a].tokens > packed.groups[b].tokens; });
  for (int32_t group = 0; group < packed.group_count; ++group) {
    walk.tasks += packed.groups[group].sequences * packed.heads;
    walk.scratch = std::max(walk.scratch, scratch(kernels, packed.groups[group].tokens, packed.head_width));
  }
  parallel_for(
      0, walk.tasks,
      [](int64_t, int64_t, void* context) {
        WalkOverSequences& walk = *static_cast<WalkOverSequences*>(context);
        const Buffer<char> scratch(walk.scratch);
#if defined(__x86_64__)
        if (walk.kernels.tiles) {
          const AmxTiles tiles;
          return walk.work(scratch.data);
        }
#endif
        walk.work(scratch.data);
      },
      &walk);
}

void rope_attention_cpu(const RopeAttention& args, ParallelFor parallel_for) {
  for_each_sequence_and_head(args.packed, forward_of_sequence, forward_scratch, &args, parallel_for);
}

// ---- rotation alone -------------------------------------------------------------------------------------------------

namespace {

void rotate_sequence(const void* context, const AttentionKernels& kernels, const SequenceOfHead& sequence, char*) {
  const RopeRotate& args = *static_cast<const RopeRotate*>(context);
  const RopePacked& packed = args.packed;
  const int64_t width = packed.head_width, size = element_bytes(packed.element);
  const int64_t out_row = 2 * packed.heads * width * size;
  for (int64_t part = 0; part < 2; ++part) {
    const char* from = element_at(
        args.input, packed,
        sequence.first_token * args.stride.token + part * args.stride.part + sequence.head * args.stride.head);
    char* to = static_cast<char*>(args.output) +
               ((sequence.first_token * 2 + part) * packed.heads + sequence.head) * width * size;
    kernels.rotate_rows({packed.element, from, args.stride.token * size, width, sequence.tokens, &sequence.turn,
                         args.inverse, to, out_row});
  }
}

}  // namespace

void rope_rotate_cpu(const RopeRotate& args, ParallelFor parallel_for) {
  for_each_sequence_and_head(
      args.packed, rotate_sequence, [](const AttentionKernels&, int64_t, int64_t) -> int64_t { return kLine; }, &args,
      parallel_for);
}

}  // namespace dinov3_ext
