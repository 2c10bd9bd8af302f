#include "core/cuda_status.h"

#include <cuda_runtime.h>

namespace dinov3_ext {

const char* cuda_status_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

int cuda_runtime_version() { return CUDART_VERSION; }

}  // namespace dinov3_ext
