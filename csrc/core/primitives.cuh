// The device vocabulary: the only inline PTX of this package.
#pragma once

namespace dinov3_ext {

// 2^x by the special function unit, relative error 2^-22; subnormal results are zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace dinov3_ext
