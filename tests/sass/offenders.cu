// Kernels that each break one rule, so that tests/sass/test_rules.py knows that the rules can fail. Not shipped.
#include <cstdint>

namespace dinov3_ext {

__global__ void __launch_bounds__(1024) spills(float* x) {
  float value[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) value[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) {
#pragma unroll
    for (int j = 0; j < 96; j += 7) value[i] = fmaf(value[i], value[j], 1.f);
  }
#pragma unroll
  for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = value[i];
}

__global__ void local_array(float* x, const int* index) {
  float value[32];
  for (int i = 0; i < 32; ++i) value[i] = x[i];
  for (int i = 0; i < 32; ++i) value[index[i] & 31] += 1.f;
  for (int i = 0; i < 32; ++i) x[i] = value[i];
}

__global__ void divides(float* x, int n) {
#pragma unroll 1
  for (int i = 0; i < n; ++i) x[i] = x[i] / x[i + 1];
}

__global__ void adds_atomically(float* x) { atomicAdd(x, float(threadIdx.x)); }

__global__ void guards(float* x) { x[threadIdx.x] = exp2f(x[threadIdx.x]); }

__global__ void doubles(float* x) { x[threadIdx.x] = float(x[threadIdx.x] * 0.1); }

__global__ void loads_two_matrices(float* x) {
  __shared__ uint4 data[32];
  uint32_t a, b;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(a), "=r"(b)
               : "r"(uint32_t(__cvta_generic_to_shared(data + threadIdx.x))));
  x[threadIdx.x] = __uint_as_float(a ^ b);
}

__global__ void copies_four_bytes(float* x) {
  __shared__ float data[32];
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(uint32_t(__cvta_generic_to_shared(data + threadIdx.x))),
               "l"(__cvta_generic_to_global(x + threadIdx.x)));
  asm volatile("cp.async.wait_all;");
  x[threadIdx.x] = data[threadIdx.x];
}

__global__ void keeps_the_rules(float* x, int n) {
#pragma unroll 1
  for (int i = 0; i < n; ++i) x[threadIdx.x] = fmaf(x[threadIdx.x], 2.f, 1.f);
  if (n < 0) x[0] = x[1] / x[2];  // a division outside of loops is allowed
}

}  // namespace dinov3_ext
