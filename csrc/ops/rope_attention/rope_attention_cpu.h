// What the CPU's forward and backward share: the steps between products, one table of them per instruction set.
//
// A sequence and head is one task. Scores are made transposed, keys x queries: sixteen queries are the lanes of a
// vector, so that maxima and sums need no exchange between lanes, keys that do not exist are rows that are not
// computed, and the softmax's result lies as the right operand of the product with v transposed. Layouts:
// core/cpu_product.h.
#pragma once

#include "core/cpu_product.h"
#include "ops/rope_attention/rope_attention.h"

namespace dinov3_ext {

// The rotation of a sequence's rows.
struct Turn {
  const float* rope;  // (rows, 2, quarter)
  int64_t quarter;    // E / 4
  int64_t prefix, y_row, x_row, grid_width;
};

// Rows of a tensor, rotated, as words: `count` rows, then zeros up to `padded` rows and up to `row_words` words.
struct ReadRows {
  Element element;
  const char* from;  // row 0
  int64_t from_row;  // bytes
  int64_t width;     // E, a multiple of 16
  int64_t first;     // token of row 0 within its sequence
  int64_t count, padded;
  const Turn* turn;  // null: not rotated
  char* to;
  int64_t row_words;
};

// Rows of floats, in panels of 16 columns, times `factor`, turned back, to a tensor.
struct WriteRows {
  const char* from;    // columns 16 p .. of row r: one line at from + p * from_panel + r * 64
  int64_t from_panel;  // bytes
  float factor;
  const float* factors;  // (count,) per row, or null
  Element element;
  int64_t width, first, count;
  const Turn* turn;  // null: not turned
  bool inverse;
  char* to;
  int64_t to_row;  // bytes
};

// Rows of a tensor, turned (or turned back), to rows of another of the same type.
struct RotateRows {
  Element element;
  const char* from;
  int64_t from_row;  // bytes
  int64_t width, count;
  const Turn* turn;
  bool inverse;
  char* to;
  int64_t to_row;  // bytes
};

// Blocks of 16 x 16 words, transposed.
struct Transpose {
  const char* from;
  int64_t from_row, from_block;  // bytes
  char* to;
  int64_t to_row, to_block;  // bytes
  int64_t blocks;
};

// 16 rows of words (32 rows of bf16, neighbours joined to pairs) as the right operand of a product along the rows.
struct Stack {
  const char* from;
  int64_t from_row;  // bytes
  char* to;
  int64_t to_panel;  // bytes
  int64_t panels;    // of 16 columns
};

// One chunk of keys of the softmax down the keys of `panels` panels of 16 queries.
struct Softmax {
  char* scores;  // (keys, 16) per panel
  int64_t scores_panel;
  char* weights;  // right operand; fp32: where the scores are
  int64_t weights_panel;
  int64_t panels, keys, padded_words;  // words behind the keys are zeroed
  float scale;                         // times log2(e)
  bool first;                          // chunk of these queries
  float *maxima, *sums;                // (16,) per panel, of all chunks so far; maxima of unscaled scores
  char* out;                           // (E, 16) per panel, corrected for the new maximum
  int64_t out_panel, out_rows;
};

// P = exp2(scale s - lse), dS = P (dP - delta), as operands of the three products that follow. fp32: P where the scores
// are, dS where dP is, and the pointers of the operands are not used.
struct ScoreGradient {
  char* scores;        // (keys, 16) per panel
  char* weights_grad;  // dP, the same
  int64_t panel;       // bytes between panels of these two
  int64_t panels, keys, padded_rows, padded_words;
  float scale;
  const float *lse, *delta;  // (16,) per panel
  char *weights, *left;      // P and dS as left operands along the queries
  int64_t left_line;         // bytes
  char* right;               // dS as right operand along the keys
  int64_t right_panel;       // bytes
};

struct AttentionKernels {
  int64_t pair;                 // bf16 elements in a word: 2, or 1 where words are floats
  int64_t row_step, word_step;  // that the product's rows and words must be multiples of
  bool tiles;                   // an AmxTiles must be alive
  void (*multiply)(const Product&);
  void (*read_rows)(const ReadRows&);
  void (*write_rows)(const WriteRows&);
  void (*rotate_rows)(const RotateRows&);
  void (*transpose)(const Transpose&);
  void (*stack)(const Stack&);
  void (*softmax)(const Softmax&);
  void (*score_gradient)(const ScoreGradient&);
  void (*row_products)(Element, const char* a, int64_t a_row, const char* b, int64_t b_row, int64_t width,
                       int64_t count,
                       float* sums);  // sum over e of a b, per row; writes whole sixteens, zeros behind count
};

// The table for the instruction set in use and tensors of `element`.
const AttentionKernels& attention_kernels(Element element);

// ---- one sequence of one head ---------------------------------------------------------------------------------------

struct SequenceOfHead {
  int64_t head;
  int64_t first_token, tokens;  // of the packed list
  Turn turn;
};

inline int64_t element_bytes(Element element) { return element == Element::float32 ? 4 : 2; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Sizes that follow from tokens and head width.
struct Sizes {
  int64_t pair, tokens, width;
  int64_t line_rows;  // rows that a line along them holds: 16 words
  int64_t lines;      // of the tokens
  int64_t padded;     // tokens, whole lines
  int64_t row_words;  // of a row along E, whole lines
  Sizes(const AttentionKernels& kernels, int64_t tokens, int64_t width)
      : pair(kernels.pair),
        tokens(tokens),
        width(width),
        line_rows(kLineWords * pair),
        lines(divide_up(tokens, line_rows)),
        padded(lines * line_rows),
        row_words(round_up(divide_up(width, pair), kLineWords)) {}
};

// Hands out blocks of whole lines; with a null start it only counts.
class Blocks {
 public:
  explicit Blocks(char* start) : start_(start) {}
  char* take(int64_t bytes) {
    char* block = start_ ? start_ + used_ : nullptr;
    used_ += round_up(bytes, kLine) + kLine;  // a line between blocks: not all at multiples of the cache's ways
    return block;
  }
  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

// Runs body(context, kernels, sequence, scratch) once per sequence and head, longest sequences first, each thread
// taking the next that is left: who computes what has no influence on any result.
using AttentionTask = void (*)(const void* context, const AttentionKernels& kernels, const SequenceOfHead& sequence,
                               char* scratch);
using AttentionScratch = int64_t (*)(const AttentionKernels& kernels, int64_t tokens, int64_t width);
void for_each_sequence_and_head(const RopePacked& packed, AttentionTask task, AttentionScratch scratch,
                                const void* context, ParallelFor parallel_for);

}  // namespace dinov3_ext
