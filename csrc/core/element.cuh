// Elements of a tensor as floats on the device, one or a 16-byte vector at a time.
#pragma once

#include <cstdint>

#include "core/element.h"

namespace dinov3_ext {

template <Element E>
struct Storage {
  using Type = uint16_t;
};
template <>
struct Storage<Element::float32> {
  using Type = float;
};

// Elements in 16 bytes.
template <Element E>
inline constexpr int kPerVector = 16 / int(sizeof(typename Storage<E>::Type));

template <Element E>
__device__ __forceinline__ float widen(typename Storage<E>::Type bits) {
  if constexpr (E == Element::float32) {
    return bits;
  } else if constexpr (E == Element::bfloat16) {
    return __uint_as_float(uint32_t(bits) << 16);
  } else {
    // As in core/cpu_vector.h: exponent and mantissa into place, bias corrected by a product, specials put back.
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    const uint32_t scaled = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
    const uint32_t value = (bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : scaled;
    return __uint_as_float(value | (uint32_t(bits & 0x8000u) << 16));
  }
}

// N elements from `from`; with N = kPerVector<E> the address must be a multiple of 16 bytes.
template <Element E, int N>
__device__ __forceinline__ void load_elements(const typename Storage<E>::Type* from, float (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = widen<E>(*from);
  } else {
    static_assert(N == kPerVector<E>);
    union {
      uint4 vector;
      typename Storage<E>::Type elements[N];
    } bits;
    bits.vector = *reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = widen<E>(bits.elements[i]);
  }
}

}  // namespace dinov3_ext
