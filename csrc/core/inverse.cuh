// Quotients by a temperature on the device.
#pragma once

#include "core/inverse.h"
#include "core/primitives.cuh"

namespace dinov3_ext {

// x / temperature + addend. The large product meets the addend, which mostly cancels it, before anything is rounded.
__device__ __forceinline__ float divide_add(float x, const Inverse& temperature, float addend) {
  return fmaf(x, temperature.small, fmaf(x, temperature.large, addend));
}

// The float nearest to 1 / temperature.
__device__ __forceinline__ float nearest(const Inverse& temperature) { return temperature.large + temperature.small; }

}  // namespace dinov3_ext
