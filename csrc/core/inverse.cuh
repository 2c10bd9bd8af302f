// Quotients by a temperature on the device.
#pragma once

#include "core/inverse.h"
#include "core/primitives.cuh"

namespace dinov3_ext {

// x / temperature + first + second, terms that mostly cancel. The small product comes last: before, it would be lost in
// the rounding of large sums.
__device__ __forceinline__ float divide_add(float x, const Inverse& temperature, float first, float second) {
  return fmaf(x, temperature.small, fmaf(x, temperature.large, first) + second);
}

// The float nearest to 1 / temperature.
__device__ __forceinline__ float nearest(const Inverse& temperature) { return temperature.large + temperature.small; }

}  // namespace dinov3_ext
