// Element types of the tensors a kernel reads.
#pragma once

namespace dinov3_ext {

enum class Element : int { float32, bfloat16, float16 };

}  // namespace dinov3_ext
