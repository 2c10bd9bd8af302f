// The backward of rope_attention on the CPU.
//
// One sequence and head. Kept for the whole sequence: R(k) and v as rows, R(k) transposed, the sums of dR(k) and dv.
// Then, for 64 queries (128 of bf16) at a time and chunks of at most 128 keys (32 or 64 KB of scores and as much of
// their gradient, which stay in the second cache), with the gradient g of the result:
//   S^T = R(k) R(q)^T,  dP^T = v g^T,  P = exp2(S - lse),  dS = P (dP - delta)
//   dv += P^T g,  dR(k) += dS^T R(q),  dR(q)^T += R(k)^T dS^T
// Five products, each done once; every task writes gradients that no other task touches.
#include <algorithm>

#include "ops/rope_attention/rope_attention_cpu.h"

namespace dinov3_ext {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int64_t kQueryWords = 64;   // of one block: as many queries of floats, twice as many of bf16
constexpr int64_t kKeysAtOnce = 128;  // of one chunk

// Rows of a block of queries (or of the gradient of their results) as the right operands of both kinds of product.
struct BlockOperands {
  char *across, *along;  // contracted over E: panels of queries; contracted over the queries: panels of E
};

struct BackwardBuffers {
  char *keys, *values, *keys_across, *keys_grad, *values_grad, *rows, *stacked, *scores, *weights_grad, *weights, *left,
      *right, *query_grad;
  BlockOperands query, grad;
  int64_t bytes;
  BackwardBuffers(const Sizes& sizes, char* scratch) {
    Blocks blocks(scratch);
    const int64_t panels = kQueryWords * sizes.pair / 16, row_bytes = sizes.row_words * 4;
    const int64_t chunk_lines = kKeysAtOnce * kLine, operand_lines = divide_up(panels, sizes.pair) * chunk_lines;
    keys = blocks.take(sizes.padded * row_bytes);
    values = blocks.take(sizes.padded * row_bytes);
    keys_across = blocks.take(sizes.lines * sizes.width * kLine);
    keys_grad = blocks.take(sizes.padded * sizes.width * 4);
    values_grad = blocks.take(sizes.padded * sizes.width * 4);
    rows = blocks.take(kQueryWords * sizes.pair * row_bytes);
    stacked = blocks.take(sizes.width * kLine);
    for (BlockOperands* operands : {&query, &grad}) {
      operands->across = blocks.take(panels * sizes.row_words * kLine);
      operands->along = blocks.take(sizes.width / 16 * kQueryWords * kLine);
    }
    scores = blocks.take(panels * chunk_lines);
    weights_grad = blocks.take(panels * chunk_lines);
    weights = sizes.pair == 1 ? scores : blocks.take(operand_lines);
    left = sizes.pair == 1 ? weights_grad : blocks.take(operand_lines);
    right = sizes.pair == 1 ? weights_grad : blocks.take(panels * chunk_lines / sizes.pair);
    query_grad = blocks.take(panels * sizes.width * kLine);
    bytes = blocks.used();
  }
};

struct Backward {
  const RopeAttentionBackward& args;
  const AttentionKernels& kernels;
  const SequenceOfHead& sequence;
  const Sizes sizes;
  const BackwardBuffers buffers;
  int64_t row_bytes, token_bytes;  // of words; of qkv
  float scale;                     // of dq and dk: a single key has weight 1 whatever q and k are, so they get zeros
  const char* qkv;                 // this head's first query

  Backward(const RopeAttentionBackward& args, const AttentionKernels& kernels, const SequenceOfHead& sequence,
           char* scratch)
      : args(args),
        kernels(kernels),
        sequence(sequence),
        sizes(kernels, sequence.tokens, args.packed.head_width),
        buffers(sizes, scratch),
        row_bytes(sizes.row_words * 4),
        token_bytes(args.stride.token * size()),
        scale(sequence.tokens == 1 ? 0.f : args.scale),
        qkv(static_cast<const char*>(args.qkv) +
            (sequence.first_token * args.stride.token + sequence.head * args.stride.head) * size()) {}

  int64_t block() const { return kQueryWords * sizes.pair; }
  int64_t size() const { return element_bytes(args.packed.element); }
  const char* part(int64_t number) const { return qkv + number * args.stride.part * size(); }
  char* grad_of_part(int64_t number) const {
    const RopePacked& packed = args.packed;
    return static_cast<char*>(args.qkv_grad) +
           ((sequence.first_token * 3 + number) * packed.heads + sequence.head) * sizes.width * size();
  }
  int64_t grad_row() const { return 3 * args.packed.heads * sizes.width * size(); }

  void read(const char* from, int64_t from_row, int64_t first, int64_t padded, bool turned, char* to) const {
    const int64_t count = std::clamp<int64_t>(sizes.tokens - first, 0, padded);
    kernels.read_rows({args.packed.element, from + first * from_row, from_row, sizes.width, first, count, padded,
                       turned ? &sequence.turn : nullptr, to, sizes.row_words});
  }

  void read_keys_and_values() const {
    read(part(1), token_bytes, 0, sizes.padded, true, buffers.keys);
    read(part(2), token_bytes, 0, sizes.padded, false, buffers.values);
    for (int64_t line = 0; line < sizes.lines; ++line) {
      kernels.stack({buffers.keys + line * sizes.line_rows * row_bytes, row_bytes, buffers.stacked, 16 * kLine,
                     sizes.width / 16});
      kernels.transpose({buffers.stacked, kLine, 16 * kLine, buffers.keys_across + line * sizes.width * kLine, kLine,
                         16 * kLine, sizes.width / 16});
    }
  }

  // `padded` rows, a whole number of lines along the queries.
  void read_block(const char* from, int64_t from_row, int64_t first, int64_t padded, bool turned,
                  const BlockOperands& to) const {
    read(from, from_row, first, padded, turned, buffers.rows);
    for (int64_t panel = 0; panel < padded / 16; ++panel) {
      kernels.transpose({buffers.rows + panel * 16 * row_bytes, row_bytes, kLine,
                         to.across + panel * sizes.row_words * kLine, kLine, 16 * kLine, sizes.row_words / 16});
    }
    for (int64_t line = 0; line < padded / sizes.line_rows; ++line) {
      kernels.stack({buffers.rows + line * sizes.line_rows * row_bytes, row_bytes, to.along + line * 16 * kLine,
                     kQueryWords * kLine, sizes.width / 16});
    }
  }

  void query_block(int64_t first) const {
    const RopePacked& packed = args.packed;
    const int64_t queries = std::min(block(), sizes.tokens - first), panels = divide_up(queries, 16);
    const int64_t padded = round_up(queries, sizes.line_rows);
    const int64_t grad_bytes = args.grad_stride.token * size(), out_bytes = packed.heads * sizes.width * size();
    const char* grad = static_cast<const char*>(args.grad) +
                       (sequence.first_token * args.grad_stride.token + sequence.head * args.grad_stride.head) * size();
    const char* out =
        static_cast<const char*>(args.out) + sequence.first_token * out_bytes + sequence.head * sizes.width * size();
    read_block(part(0), token_bytes, first, padded, true, buffers.query);
    read_block(grad, grad_bytes, first, padded, false, buffers.grad);
    alignas(kLine) float lse[2 * kQueryWords] = {}, delta[2 * kQueryWords] = {};
    kernels.row_products(packed.element, grad + first * grad_bytes, grad_bytes, out + first * out_bytes, out_bytes,
                         sizes.width, queries, delta);
    std::copy_n(args.lse + sequence.head * packed.tokens + sequence.first_token + first, queries, lse);
    for (int64_t key = 0; key < sizes.tokens; key += kKeysAtOnce) {
      key_chunk(key, std::min(kKeysAtOnce, sizes.tokens - key), queries, lse, delta, first > 0);
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t row = first + panel * 16;
      kernels.transpose({buffers.query_grad + panel * sizes.width * kLine, kLine, 16 * kLine, buffers.stacked, kLine,
                         16 * kLine, sizes.width / 16});
      kernels.write_rows({buffers.stacked, 16 * kLine, scale, nullptr, packed.element, sizes.width, row,
                          std::min<int64_t>(16, sizes.tokens - row), &sequence.turn, true,
                          grad_of_part(0) + row * grad_row(), grad_row()});
    }
  }

  void key_chunk(int64_t first, int64_t keys, int64_t queries, const float* lse, const float* delta, bool add) const {
    const int64_t rows = round_up(keys, kernels.row_step), chunk_panel = kKeysAtOnce * kLine;
    const int64_t panels = divide_up(queries, 16);
    const int64_t words = round_up(divide_up(keys, sizes.pair), kernels.word_step);
    const int64_t across = sizes.row_words * kLine, along = kQueryWords * kLine;
    const int64_t right_panel = chunk_panel / sizes.pair,
                  query_words = round_up(divide_up(queries, sizes.pair), kernels.word_step);
    kernels.multiply({buffers.keys + first * row_bytes, row_bytes, kLine, buffers.query.across, across, buffers.scores,
                      chunk_panel, rows, panels, sizes.row_words, false});
    kernels.multiply({buffers.values + first * row_bytes, row_bytes, kLine, buffers.grad.across, across,
                      buffers.weights_grad, chunk_panel, rows, panels, sizes.row_words, false});
    kernels.score_gradient({buffers.scores, buffers.weights_grad, chunk_panel, panels, keys, rows, words,
                            args.scale * kLog2E, lse, delta, buffers.weights, buffers.left, chunk_panel, buffers.right,
                            right_panel});
    const int64_t sums_panel = sizes.padded * kLine;
    kernels.multiply({buffers.weights, kLine, chunk_panel, buffers.grad.along, along,
                      buffers.values_grad + first * kLine, sums_panel, rows, sizes.width / 16, query_words, add});
    kernels.multiply({buffers.left, kLine, chunk_panel, buffers.query.along, along, buffers.keys_grad + first * kLine,
                      sums_panel, rows, sizes.width / 16, query_words, add});
    kernels.multiply({buffers.keys_across + first / sizes.line_rows * sizes.width * kLine, kLine, sizes.width * kLine,
                      buffers.right, right_panel, buffers.query_grad, sizes.width * kLine, sizes.width, panels, words,
                      first > 0});
  }

  void run() const {
    read_keys_and_values();
    for (int64_t first = 0; first < sizes.tokens; first += block()) query_block(first);
    const RopePacked& packed = args.packed;
    kernels.write_rows({buffers.keys_grad, sizes.padded * kLine, scale, nullptr, packed.element, sizes.width, 0,
                        sizes.tokens, &sequence.turn, true, grad_of_part(1), grad_row()});
    kernels.write_rows({buffers.values_grad, sizes.padded * kLine, 1.f, nullptr, packed.element, sizes.width, 0,
                        sizes.tokens, nullptr, false, grad_of_part(2), grad_row()});
  }
};

}  // namespace

void rope_attention_backward_cpu(const RopeAttentionBackward& args, ParallelFor parallel_for) {
  for_each_sequence_and_head(
      args.packed,
      [](const void* context, const AttentionKernels& kernels, const SequenceOfHead& sequence, char* scratch) {
        Backward(*static_cast<const RopeAttentionBackward*>(context), kernels, sequence, scratch).run();
      },
      [](const AttentionKernels& kernels, int64_t tokens, int64_t width) {
        return BackwardBuffers(Sizes(kernels, tokens, width), nullptr).bytes;
      },
      &args, parallel_for);
}

}  // namespace dinov3_ext
