// Elements of a tensor as floats on the device, one or a 16-byte vector at a time.
#pragma once

#include "core/primitives.cuh"

namespace dinov3_ext {

// Elements in 16 bytes.
template <Element E>
inline constexpr int kPerVector = 16 / int(sizeof(typename Storage<E>::Type));

// N elements from `from`; with N = kPerVector<E> the address must be a multiple of 16 bytes.
template <Element E, int N>
__device__ __forceinline__ void load_elements(const typename Storage<E>::Type* from, float (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = widen<E>(load_global(from));
  } else {
    static_assert(N == kPerVector<E>);
    const uint4 bits = load_global(reinterpret_cast<const uint4*>(from));
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (E == Element::float32) {
        to[i] = bits_to_float(words[i]);
      } else {
        const float2 two = unpack<E>(words[i]);
        to[2 * i] = two.x, to[2 * i + 1] = two.y;
      }
    }
  }
}

}  // namespace dinov3_ext
