#include "core/cuda_status.h"

#include <cuda_runtime.h>

#include "core/architecture.h"

namespace dinov3_ext {

const char* cuda_status_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

int cuda_runtime_version() { return CUDART_VERSION; }

int device_architecture(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0: not asked yet; two threads that ask at once store the same
  if (device < 0 || device >= kDevices) return 0;
  if (const int architecture = known[device].load(std::memory_order_relaxed)) return architecture;
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return 0;
  }
  known[device].store(10 * major + minor, std::memory_order_relaxed);
  return 10 * major + minor;
}

}  // namespace dinov3_ext
