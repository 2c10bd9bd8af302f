// Elements of a tensor as floats on the device, one or a 16-byte vector at a time.
#pragma once

#include "core/primitives.cuh"

namespace dinov3_ext {

template <bool First, class A, class B>
struct Choose {
  using Type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using Type = B;
};

// Elements in 16 bytes.
template <Element E>
inline constexpr int kPerVector = 16 / int(sizeof(typename Storage<E>::Type));

// N elements as they lie in memory: one, or 16 bytes of them. Loads into these can be issued together, before any is
// used.
template <Element E, int N>
struct Packed {
  static_assert(N == 1 || N == kPerVector<E>);
  using Type = typename Choose<N == 1, typename Storage<E>::Type, uint4>::Type;
};

// N elements from `from`, which must be a multiple of 16 bytes where N > 1. `Once`: this kernel reads them once.
template <Element E, int N, bool Once = false>
__device__ __forceinline__ typename Packed<E, N>::Type load_packed(const typename Storage<E>::Type* from) {
  const auto* address = reinterpret_cast<const typename Packed<E, N>::Type*>(from);
  if constexpr (Once) {
    return load_global_once(address);
  } else {
    return load_global(address);
  }
}

template <Element E, int N>
__device__ __forceinline__ void widen_packed(const typename Packed<E, N>::Type& from, float (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = widen<E>(from);
  } else {
    const uint32_t words[4] = {from.x, from.y, from.z, from.w};
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

template <Element E, int N>
__device__ __forceinline__ void load_elements(const typename Storage<E>::Type* from, float (&to)[N]) {
  widen_packed<E, N>(load_packed<E, N>(from), to);
}

// Rounded to nearest even; `to` a multiple of 16 bytes where N > 1.
template <Element E, int N>
__device__ __forceinline__ void store_elements(typename Storage<E>::Type* to, const float (&from)[N]) {
  if constexpr (N == 1) {
    store_global(to, narrow<E>(from[0]));
  } else if constexpr (E == Element::float32) {
    store_global(reinterpret_cast<float4*>(to), float4{from[0], from[1], from[2], from[3]});
  } else {
    store_global(reinterpret_cast<uint4*>(to), uint4{pack<E>(from[0], from[1]), pack<E>(from[2], from[3]),
                                                     pack<E>(from[4], from[5]), pack<E>(from[6], from[7])});
  }
}

// N floats; N = 1 or a multiple of 4, `from` then a multiple of 16 bytes.
template <int N>
__device__ __forceinline__ void load_floats(const float* from, float (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = load_global(from);
  } else {
    static_assert(N % 4 == 0);
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 four = load_global(reinterpret_cast<const float4*>(from + i));
      to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
  }
}
template <int N>
__device__ __forceinline__ void store_floats(float* to, const float (&from)[N]) {
  if constexpr (N == 1) {
    store_global(to, from[0]);
  } else {
    static_assert(N % 4 == 0);
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      store_global(reinterpret_cast<float4*>(to + i), float4{from[i], from[i + 1], from[i + 2], from[i + 3]});
    }
  }
}

}  // namespace dinov3_ext
