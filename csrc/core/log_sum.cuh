// The logarithm of a sum of exponentials in one pass: a maximum and a sum relative to it.
#pragma once

#include "core/block_reduce.cuh"

namespace dinov3_ext {

// Of numbers x: sum of 2^(scale x), as `sum` times 2^(scale maximum). Every call on one object takes the same scale >
// 0. A NaN or an infinite x makes the sum NaN; x = -inf adds nothing.
struct LogSum {
  // Where the maximum begins: below every number met in practice, and finite, so that x = -inf adds 2^-inf = 0 and
  // never inf - inf.
  static constexpr float kLowest = -1e30f;

  float maximum = kLowest;
  float sum = 0.f;

  __device__ __forceinline__ bool nothing() const { return maximum == kLowest; }

  // One exponential for each number, and one to move the sum to the new maximum.
  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N], float scale) {
    float highest = maximum;
#pragma unroll
    for (int i = 0; i < N; ++i) highest = fmaxf(highest, x[i]);
    float added = 0.f;
    // The difference first: it is exact near the maximum, where it matters.
#pragma unroll
    for (int i = 0; i < N; ++i) added += exp2_approx((x[i] - highest) * scale);
    sum = fmaf(sum, exp2_approx((maximum - highest) * scale), added);
    maximum = highest;
  }

  __device__ __forceinline__ void merge(const LogSum& other, float scale) {
    const float highest = fmaxf(maximum, other.maximum);
    sum = sum * exp2_approx((maximum - highest) * scale) + other.sum * exp2_approx((other.maximum - highest) * scale);
    maximum = highest;
  }

  // Over groups of `Lanes` neighbouring lanes; each of them gets the result. All lanes of the warp call it.
  template <int Lanes>
  __device__ __forceinline__ void reduce_over_lanes(float scale) {
    const float highest = lanes_reduce<Larger, Lanes>(maximum);
    sum = lanes_reduce<Add, Lanes>(sum * exp2_approx((maximum - highest) * scale));
    maximum = highest;
  }
  __device__ __forceinline__ void reduce_over_warp(float scale) { reduce_over_lanes<32>(scale); }
};

}  // namespace dinov3_ext
