// What a launcher's status means, without cuda_runtime.h: the binding is compiled by the host compiler alone.
#pragma once

namespace dinov3_ext {

inline constexpr int kBuiltWithoutCuda = -1;  // no cudaError_t

const char* cuda_status_text(int status);  // the runtime's own words
int cuda_runtime_version();                // of the runtime linked in, e.g. 13000; 0 in a build without nvcc

}  // namespace dinov3_ext
