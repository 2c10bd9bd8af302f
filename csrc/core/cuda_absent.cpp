// Stands in for cuda_status.cu in a build without nvcc.
#include "core/architecture.h"
#include "core/cuda_status.h"

namespace dinov3_ext {

const char* cuda_status_text(int) { return "dinov3_ext was built without nvcc and has no CUDA kernels"; }

int cuda_runtime_version() { return 0; }

int device_architecture(int) { return 0; }

}  // namespace dinov3_ext
