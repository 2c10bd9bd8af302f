// Blocks that fit one multiprocessor at a time, by the toolkit's own calculator; needs no GPU and no CUDA runtime.
// Reads lines of: architecture, threads, registers, static shared bytes, dynamic shared bytes; answers one number each.
#include <cuda_occupancy.h>

#include <cstdio>

namespace {

cudaOccDeviceProp device(int architecture) {
  const bool large = architecture == 80 || architecture == 90 || architecture == 100;
  cudaOccDeviceProp p;
  p.computeMajor = architecture / 10, p.computeMinor = architecture % 10;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiprocessor = large ? 2048 : 1536;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.warpSize = 32;
  p.sharedMemPerBlock = 48 * 1024;
  p.sharedMemPerMultiprocessor = architecture == 80 ? 164 * 1024 : large ? 228 * 1024 : 100 * 1024;
  p.sharedMemPerBlockOptin = p.sharedMemPerMultiprocessor - 1024;
  p.reservedSharedMemPerBlock = 1024;
  p.numSms = 1;  // not asked about
  return p;
}

}  // namespace

int main() {
  int architecture, threads, registers, fixed, dynamic;
  while (std::scanf("%d %d %d %d %d", &architecture, &threads, &registers, &fixed, &dynamic) == 5) {
    const cudaOccDeviceProp properties = device(architecture);
    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = 1024;
    function.numRegs = registers;
    function.sharedSizeBytes = size_t(fixed);
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    function.maxDynamicSharedSizeBytes = properties.sharedMemPerBlockOptin;
    function.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &function, &state, threads, size_t(dynamic));
    std::printf("%d\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -int(error));
  }
}
