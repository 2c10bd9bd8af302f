// Attention over packed sequences with axial rotary positions. Torch-free: this header is all that the kernels, the
// CPU code and the binding share.
//
// For token n of a sequence and each head, with R the rotation by the token's row and column (prefix tokens: none):
//   s[n, j] = scale * R(q[n]) . R(k[j])        over the tokens j of the same sequence
//   out[n]  = sum_j p[n, j] v[j],  p[n, j] = 2^(s[n, j] log2(e) - lse[n])
//   lse[n]  = log2 sum_j 2^(s[n, j] log2(e))   in units of log2, so that p is one exp2
// R turns the pair (e, e + E/2) by the angle of component e: the first E/4 components take the y-row of the token, the
// next E/4 its x-row: patch m = n - prefix of a sequence reads rows y_row + m / width and x_row + m % width.
//   x'[e] = x[e] cos - x[e + E/2] sin,   x'[e + E/2] = x[e + E/2] cos + x[e] sin     in fp32, rounded once
//
// Offsets are int64; results do not depend on the device's number of processors, and two runs agree bit for bit.
#pragma once

#include <cstdint>

#include "core/element.h"
#include "core/parallel.h"

namespace dinov3_ext {

inline constexpr int kMaxGroups = 16;       // the binding calls a launcher once per 16 groups of a layout
inline constexpr int kSequenceColumns = 6;  // first token, tokens, prefix length, first y-row, first x-row, grid width
inline constexpr int kMaxTokens = 1 << 21;  // of one sequence: rope_rows (core/rope.cuh) divides in floats

// A run of equally long, consecutive sequences. Known to the host, so that tiles and grids are chosen without a wait.
struct SequenceGroup {
  int64_t first_sequence;  // its row in the table of sequences
  int64_t first_token;     // sequence s of the group begins at first_token + s * tokens
  int64_t sequences;       // > 0
  int32_t tokens;          // 1 .. kMaxTokens
};

// What all rope ops share.
struct RopePacked {
  Element element;           // of every tensor but rope, lse and delta
  int32_t heads;             // H > 0
  int32_t head_width;        // E, a multiple of 4
  int32_t architecture;      // of the device, e.g. 90 (core/architecture.h): decides tiles and workspaces, nothing else
  int64_t tokens;            // of all sequences together, > 0
  const float* rope;         // (rows, 2, E/4) contiguous: cosines, sines
  const int32_t* sequences;  // (S, 6) contiguous, on the device
  int32_t group_count;
  SequenceGroup groups[kMaxGroups];
};

// (tokens, parts, H, E) with the last dimension contiguous; strides in elements. The kernels that copy 16 bytes at a
// time need the pointer and every stride to be multiples of 16 bytes; the binding checks that.
struct RopeStrides {
  int64_t token, part, head;
};

struct RopeRotate {
  RopePacked packed;
  const void* input;   // (tokens, 2 or 3, H, E): q, k (and v, not read)
  RopeStrides stride;  // of `input`
  void* output;        // (tokens, 2, H, E) contiguous
  bool inverse;        // turn back: the backward of the rotation
};

struct RopeAttention {
  RopePacked packed;
  const void* qkv;     // (tokens, 3, H, E)
  RopeStrides stride;  // of `qkv`
  void* rotated;       // workspace (tokens, 2, H, E) for R(q), R(k); null where rope_attention_needs_rotated says no
  void* out;           // (tokens, H, E) contiguous
  float* lse;          // (H, tokens) contiguous: neighbouring tokens of a head are stored and read together
  float scale;         // > 0
};

struct RopeAttentionBackward {
  RopePacked packed;
  const void* grad;         // (tokens, H, E) gradient of `out`; grad_stride.part is not used
  RopeStrides grad_stride;  // of `grad`
  const void* qkv;          // (tokens, 3, H, E)
  RopeStrides stride;       // of `qkv`
  const void* out;          // (tokens, H, E) contiguous
  const float* lse;         // (H, tokens) contiguous
  float* delta;             // workspace (H, tokens): sum over e of grad * out
  void* rotated;            // workspace (tokens, 2, H, E); null where rope_attention_backward_needs_rotated says no
  void* qkv_grad;           // out (tokens, 3, H, E) contiguous
  float scale;              // > 0
};

// On the CPU head_width must be a multiple of 16; `rotated` and `delta` are not used. Results do not depend on the
// number of threads.
void rope_rotate_cpu(const RopeRotate& args, ParallelFor parallel_for);
void rope_attention_cpu(const RopeAttention& args, ParallelFor parallel_for);
void rope_attention_backward_cpu(const RopeAttentionBackward& args, ParallelFor parallel_for);

// Launchers: enqueue on `stream` (a cudaStream_t), return a cudaError_t as int, never wait.
int rope_rotate_cuda(const RopeRotate& args, void* stream);

bool rope_attention_needs_rotated(const RopePacked& packed);
int rope_attention_cuda(const RopeAttention& args, void* stream);

bool rope_attention_backward_needs_rotated(const RopePacked& packed);
int rope_attention_backward_cuda(const RopeAttentionBackward& args, void* stream);

}  // namespace dinov3_ext
