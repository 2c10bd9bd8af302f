// What a launcher's status means, without cuda_runtime.h: the binding is compiled by the host compiler alone.
#pragma once

namespace dinov3_ext {

const char* cuda_status_text(int status);  // the runtime's own words
int cuda_runtime_version();                // e.g. 13000, of the runtime linked in

}  // namespace dinov3_ext
