// Sum and maximum over a thread block, in an order that depends on the block's size alone.
#pragma once

#include "core/primitives.cuh"

namespace dinov3_ext {

struct Add {
  static __device__ __forceinline__ float apply(float a, float b) { return a + b; }
};
struct Larger {  // a NaN on either side is dropped, as fmaxf does
  static __device__ __forceinline__ float apply(float a, float b) { return fmaxf(a, b); }
};

// Over groups of `Lanes` neighbouring lanes, a power of two; each of them gets the result. All lanes of the warp call
// it.
template <class Operation, int Lanes>
__device__ __forceinline__ float lanes_reduce(float value) {
#pragma unroll
  for (int mask = Lanes / 2; mask; mask /= 2) value = Operation::apply(value, shuffle_xor(value, mask));
  return value;
}
template <class Operation>
__device__ __forceinline__ float warp_reduce(float value) {
  return lanes_reduce<Operation, 32>(value);
}

// Every thread gets the result. `Threads` is a multiple of 32, at most 1024; all threads of the block call it.
// scratch: shared address of Threads / 32 floats; free again at the next block_reduce or barrier.
template <class Operation, int Threads>
__device__ __forceinline__ float block_reduce(float value, uint32_t scratch) {
  static_assert(Threads % 32 == 0 && Threads <= 1024);
  value = warp_reduce<Operation>(value);
  block_barrier();  // the previous call may still be reading
  if (lane_index() == 0) store_shared(scratch + 4u * uint32_t(warp_index()), value);
  block_barrier();
  value = load_shared<float>(scratch);
#pragma unroll
  for (int warp = 1; warp < Threads / 32; ++warp) {
    value = Operation::apply(value, load_shared<float>(scratch + 4u * uint32_t(warp)));
  }
  return value;
}

}  // namespace dinov3_ext
