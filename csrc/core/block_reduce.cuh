// Sum and maximum over a thread block, in an order that depends on the block's size alone.
#pragma once

namespace dinov3_ext {

struct Add {
  static __device__ __forceinline__ float apply(float a, float b) { return a + b; }
};
struct Larger {
  static __device__ __forceinline__ float apply(float a, float b) { return fmaxf(a, b); }
};

// Every thread gets the result. `Threads` is a multiple of 32, at most 1024; all threads of the block call it.
template <class Operation, int Threads>
__device__ __forceinline__ float block_reduce(float value) {
  static_assert(Threads % 32 == 0 && Threads <= 1024);
  __shared__ float warps[Threads / 32];
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) value = Operation::apply(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  __syncthreads();  // the previous call may still be reading
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = warps[0];
#pragma unroll
  for (int warp = 1; warp < Threads / 32; ++warp) value = Operation::apply(value, warps[warp]);
  return value;
}

}  // namespace dinov3_ext
