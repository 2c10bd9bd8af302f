// Packs the rows of one tensor and computes their inverse norms: one warp per row.
//
// Memory: every feature is read twice, the second time from L1 (a block's 8 rows are 32 KB at width 1024, fp32), and
// written once in 2 or 4 bytes; a chunk's packed features are read back from L2 where they fit.
#pragma once

#include "core/element.cuh"
#include "ops/gram_loss/gram_loss_cuda.cuh"

namespace dinov3_ext {

inline constexpr int kGramPackThreads = 256;

// A sum of squares in two floats, exact to some 2^-44: rounding of the norms would be the same along a row of
// similarities and not average out.
struct SumOfSquares {
  float high = 0.f, low = 0.f;

  __device__ __forceinline__ void add(float value, float error) {
    const float sum = high + value, moved = sum - high;
    low += (high - (sum - moved)) + (value - moved) + error;
    high = sum;
  }
  __device__ __forceinline__ void add_square(float x) {
    const float square = x * x;
    add(square, fmaf(x, x, -square));
  }
};

// Columns column .. column + N - 1 of a row; zero behind its width. Wide: N elements, 16 bytes, lie side by side.
template <Element E, int N, bool Wide>
__device__ __forceinline__ void load_columns(const typename Storage<E>::Type* row, int64_t stride, int64_t column,
                                             int64_t width, float (&value)[N]) {
  if constexpr (Wide) {
    if (column < width) return load_elements<E, N>(row + column, value);
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = 0.f;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      value[i] = column + i < width ? widen<E>(load_global(row + (column + i) * stride)) : 0.f;
    }
  }
}

// Two floats to one word of a plane, and what rounding lost of them to the next plane's.
__device__ __forceinline__ uint32_t take_part(float& first, float& second) {
  const uint32_t rounded = pack<kGramElement>(first, second);
  const float2 taken = unpack<kGramElement>(rounded);
  first -= taken.x, second -= taken.y;
  return rounded;
}

struct GramPack {
  GramFeatures features;  // of the chunk's first image
  int64_t rows;           // images patches
  int64_t patches, width, packed_width;
  uint16_t* packed;  // (images, parts, patches, packed_width)
  float* numbers;    // (images, kGramRowFields, patches)
  bool teacher;
};

template <Element E, int Parts, bool Wide>
__global__ void __launch_bounds__(kGramPackThreads) gram_pack(GramPack args) {
  constexpr int N = Wide ? kPerVector<E> : 2;
  const int64_t row = block_index<0>() * (kGramPackThreads / 32) + warp_index();
  if (row >= args.rows) return;
  const int64_t image = row / args.patches, patch = row % args.patches;
  const auto* from = static_cast<const typename Storage<E>::Type*>(args.features.data) +
                     image * args.features.image_stride + patch * args.features.row_stride;
  const int64_t stride = args.features.column_stride;

  SumOfSquares sum;
#pragma unroll 4
  for (int64_t column = lane_index() * N; column < args.width; column += 32 * N) {
    float value[N];
    load_columns<E, N, Wide>(from, stride, column, args.width, value);
#pragma unroll
    for (int i = 0; i < N; ++i) sum.add_square(value[i]);
  }
#pragma unroll
  for (int mask = 16; mask; mask /= 2) sum.add(shuffle_xor(sum.high, mask), shuffle_xor(sum.low, mask));

  // 2^exponent <= |x| < 2^(exponent + 1); infinite and NaN sums stay what they are, and so does all that follows.
  const bool is_short = sum.high <= kGramSmallestNorm * kGramSmallestNorm;
  const int square_exponent = int((float_to_bits(sum.high) >> 23) & 255) - 127;
  const int exponent = is_short ? -40 : square_exponent >> 1;
  const float scale = bits_to_float(uint32_t(127 + 14 - exponent) << 23);  // 2^k
  const float square = sum.high * scale * scale, square_low = sum.low * scale * scale;
  float inverse, self;
  if (is_short) {
    inverse = 0x1p-54f / kGramSmallestNorm;
    self = sum.high * (1.f / kGramSmallestNorm) * (1.f / kGramSmallestNorm);
  } else {
    // One more Newton step on the exact sum: 1 / |x'| to its last bit.
    const float guess = inverse_root(square), guess2 = guess * guess;
    const float excess = fmaf(square, guess2, -1.f) + fmaf(square, fmaf(guess, guess, -guess2), square_low * guess2);
    inverse = fmaf(-0.5f * guess, excess, guess);
    self = square < INFINITY ? 1.f : square - square;
  }

  const int64_t plane = args.patches * args.packed_width;
  uint16_t* to = args.packed + image * Parts * plane + patch * args.packed_width;
#pragma unroll 2
  for (int64_t column = lane_index() * N; column < args.packed_width; column += 32 * N) {
    float value[N];
    load_columns<E, N, Wide>(from, stride, column, args.width, value);
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] *= scale;
#pragma unroll
    for (int part = 0; part < Parts; ++part) {
      uint32_t words[N / 2];
#pragma unroll
      for (int i = 0; i < N / 2; ++i) words[i] = take_part(value[2 * i], value[2 * i + 1]);
      uint16_t* place = to + part * plane + column;
      if constexpr (N == 8) {
        store_global(reinterpret_cast<uint4*>(place), uint4{words[0], words[1], words[2], words[3]});
      } else if constexpr (N == 4) {
        store_global(reinterpret_cast<uint2*>(place), uint2{words[0], words[1]});
      } else {
        store_global(reinterpret_cast<uint32_t*>(place), words[0]);
      }
    }
  }

  if (lane_index() != 0) return;
  float* numbers = args.numbers + image * kGramRowFields * args.patches + patch;
  store_global(numbers + (args.teacher ? kTeacherInverse : kStudentInverse) * args.patches, inverse);
  store_global(numbers + (args.teacher ? kTeacherSelf : kStudentSelf) * args.patches, self);
  if (args.teacher) return;
  store_global(numbers + kStudentAlong * args.patches, is_short ? 0.f : 0x1p42f * inverse * inverse);
  store_global(numbers + kStudentScale * args.patches, scale * 0x1p-42f);
}

}  // namespace dinov3_ext
