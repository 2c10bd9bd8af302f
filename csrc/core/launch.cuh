// How a launcher starts a kernel: on a GPU, or inside the emulator when that is what is being compiled.
#pragma once

#include <cstdint>

#include "core/primitives.cuh"

namespace dinov3_ext {

struct Shape {
  int64_t x = 1, y = 1, z = 1;  // blocks; x up to 2^31 - 1, y and z up to 65535
  int threads = 32;             // a multiple of 32, at most 1024
  int shared_bytes = 0;         // dynamic shared memory of a block
};

// Enqueues Kernel(arguments...) on `stream` (a cudaStream_t); returns a cudaError_t as int; never waits. No blocks:
// nothing is launched.
template <auto Kernel, class... Arguments>
int launch(const Shape& shape, void* stream, const Arguments&... arguments) {
  if (shape.x == 0 || shape.y == 0 || shape.z == 0) return 0;
#if defined(DINOV3_EXT_EMULATOR)
  (void)stream;
  return emulator::run(__PRETTY_FUNCTION__, shape.x, shape.y, shape.z, shape.threads, shape.shared_bytes,
                       [&] { Kernel(arguments...); });
#else
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (status != cudaSuccess) return int(status);
  }
  Kernel<<<dim3(unsigned(shape.x), unsigned(shape.y), unsigned(shape.z)), unsigned(shape.threads),
           size_t(shape.shared_bytes), static_cast<cudaStream_t>(stream)>>>(arguments...);
  return int(cudaGetLastError());
#endif
}

}  // namespace dinov3_ext
