// Vectors of W floats in the compiler's own vector types (GCC, Clang): one source, an instruction set per caller.
//
// Everything here is always_inline and names no instruction set, so that it takes that of the function it is inlined
// into. Trap: a lambda does not inherit its enclosing function's target attribute; do not pass these through one.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/element.h"

namespace dinov3_ext {

#define DINOV3_EXT_INLINE inline __attribute__((always_inline))

template <int W>
struct Vector {
  typedef float Float __attribute__((vector_size(4 * W)));
  typedef int32_t Int __attribute__((vector_size(4 * W)));
  typedef uint32_t Unsigned __attribute__((vector_size(4 * W)));
  typedef uint16_t Half __attribute__((vector_size(2 * W)));
};

template <class To, class From>
DINOV3_EXT_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float splat(float value) {
  return typename Vector<W>::Float{} + value;  // GCC 12 builds other forms lane by lane: 16 masked broadcasts
}

template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float load(const float* from) {
  typename Vector<W>::Float to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

template <int W>
DINOV3_EXT_INLINE void store(float* to, typename Vector<W>::Float from) {
  std::memcpy(to, &from, sizeof(from));
}

template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Unsigned widened(typename Vector<W>::Half half) {
#if defined(__x86_64__)
  if constexpr (W == 16) {  // GCC 12 makes two halves and joins them: five operations
    typename Vector<W>::Unsigned wide;
    asm("vpmovzxwd %1, %0" : "=v"(wide) : "vm"(half));
    return wide;
  }
#endif
  return __builtin_convertvector(half, typename Vector<W>::Unsigned);
}

// The float16 numbers whose bits are in the low halves: move exponent and mantissa into place, correct the bias by a
// product (subnormals come out right), give infinity and NaN the full exponent.
template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float widened_float16(typename Vector<W>::Unsigned wide) {
  using V = Vector<W>;
  const auto magnitude = (wide & 0x7fffu) << 13;
  const auto scaled = bits_as<typename V::Unsigned>(bits_as<typename V::Float>(magnitude) * 0x1p112f);
  const auto special = (wide & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : scaled;
  return bits_as<typename V::Float>(special | ((wide & 0x8000u) << 16));
}

// W elements of a tensor, widened to float. T: float, or uint16_t holding the bits of the type E names.
template <Element E, int W>
DINOV3_EXT_INLINE typename Vector<W>::Float load_element(const void* base, int64_t index) {
  using V = Vector<W>;
  if constexpr (E == Element::float32) {
    return load<W>(static_cast<const float*>(base) + index);
  } else {
    typename V::Half half;
    std::memcpy(&half, static_cast<const uint16_t*>(base) + index, sizeof(half));
    const auto wide = widened<W>(half);
    if constexpr (E == Element::bfloat16) return bits_as<typename V::Float>(wide << 16);
    return widened_float16<W>(wide);
  }
}

// Bits of the nearest numbers of a 16-bit type, in the low halves: ties to even; overflow gives infinity, NaN stays
// NaN.
template <Element E, int W>
DINOV3_EXT_INLINE typename Vector<W>::Unsigned rounded(typename Vector<W>::Float value) {
  static_assert(E != Element::float32);
  using V = Vector<W>;
  const auto bits = bits_as<typename V::Unsigned>(value);
  const auto magnitude = bits & 0x7fffffffu;
  if constexpr (E == Element::bfloat16) {
    const auto nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return magnitude > 0x7f800000u ? ((bits >> 16) | 0x40u) : nearest;
  } else {
    // Normal: correct the exponent's bias and round at bit 13. Subnormal: adding 1/2 leaves the result in the low bits.
    const auto normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    const auto small = bits_as<typename V::Unsigned>(bits_as<typename V::Float>(magnitude) + 0.5f) - 0x3f000000u;
    const auto infinite = typename V::Unsigned{} + 0x7c00u;
    auto nearest = magnitude < 0x38800000u ? small : normal;
    nearest = magnitude >= 0x47800000u ? infinite : nearest;
    nearest = magnitude > 0x7f800000u ? infinite + 0x200u : nearest;
    return nearest | ((bits >> 16) & 0x8000u);
  }
}

// W floats as elements of a tensor, rounded as above.
template <Element E, int W>
DINOV3_EXT_INLINE void store_element(void* base, int64_t index, typename Vector<W>::Float value) {
  if constexpr (E == Element::float32) {
    store<W>(static_cast<float*>(base) + index, value);
  } else {
    const auto half = __builtin_convertvector(rounded<E, W>(value), typename Vector<W>::Half);
    std::memcpy(static_cast<uint16_t*>(base) + index, &half, sizeof(half));
  }
}

// The last `count` < W elements of a row, `fill` behind them.
template <Element E, int W>
DINOV3_EXT_INLINE typename Vector<W>::Float load_element_tail(const void* base, int64_t index, int64_t count) {
  constexpr int size = E == Element::float32 ? 4 : 2;
  char padded[size * W] = {};
  std::memcpy(padded, static_cast<const char*>(base) + index * size, static_cast<size_t>(count * size));
  return load_element<E, W>(padded, 0);
}

template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float load_tail(const float* from, int64_t count) {
  return load_element_tail<Element::float32, W>(from, 0, count);
}

template <int W>
DINOV3_EXT_INLINE void store_tail(float* to, typename Vector<W>::Float from, int64_t count) {
  std::memcpy(to, &from, static_cast<size_t>(count) * sizeof(float));
}

// `value` in the first `count` lanes, `other` behind them.
template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float keep_first(typename Vector<W>::Float value, int64_t count,
                                                       typename Vector<W>::Float other) {
  for (int64_t lane = count; lane < W; ++lane) value[lane] = other[lane];
  return value;
}

template <int W>
DINOV3_EXT_INLINE float sum_lanes(typename Vector<W>::Float value) {
  if constexpr (W == 2) {
    return value[0] + value[1];
  } else {
    typename Vector<W / 2>::Float half[2];
    std::memcpy(half, &value, sizeof(half));
    return sum_lanes<W / 2>(half[0] + half[1]);
  }
}

// `below` where the sign bit of `value` is set, else `above`. (GCC 12 breaks down on value < 0 ? below : above where
// the value comes straight from memory.)
template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float where_negative(typename Vector<W>::Float value,
                                                           typename Vector<W>::Float below,
                                                           typename Vector<W>::Float above) {
  using V = Vector<W>;
  const typename V::Int sign = bits_as<typename V::Int>(value) >> 31;
  return bits_as<typename V::Float>((sign & bits_as<typename V::Int>(below)) |
                                    (~sign & bits_as<typename V::Int>(above)));
}

// NaN in `a` is kept. One instruction where there is AVX (GCC 12 makes a comparison and a move of the expression).
template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float larger(typename Vector<W>::Float a, typename Vector<W>::Float b) {
#if defined(__x86_64__)
  if constexpr (W >= 8) {
    asm("vmaxps %1, %2, %0" : "=v"(b) : "v"(a), "v"(b));
    return b;
  }
#endif
  return a < b ? b : a;
}

template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float smaller(typename Vector<W>::Float a, typename Vector<W>::Float b) {
#if defined(__x86_64__)
  if constexpr (W >= 8) {
    asm("vminps %1, %2, %0" : "=v"(b) : "v"(a), "v"(b));
    return b;
  }
#endif
  return a > b ? b : a;
}

// 2^x, relative error below 2e-7; zero below 2^-126.5, 2^127 from there on, NaN stays NaN.
// Polynomial: Cephes exp2f on [-1/2, 1/2].
template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float exp2(typename Vector<W>::Float x) {
  using V = Vector<W>;
  const typename V::Float highest = splat<W>(127.f), lowest = splat<W>(-127.f);
  const typename V::Float t = larger<W>(smaller<W>(x, highest), lowest);
  constexpr float rounder = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const typename V::Float shifted = t + rounder;
  const typename V::Float f = t - (shifted - rounder);
  typename V::Float p = 1.535336188319500e-4f * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.f;
  return p * bits_as<typename V::Float>((bits_as<typename V::Int>(shifted) + 127) << 23);  // 2^-127 comes out as zero
}

// ln x of a normal number > 0, relative error below 2e-7; infinity and NaN stay. Polynomial: Cephes logf on
// [sqrt(1/2), sqrt(2)].
template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float logarithm(typename Vector<W>::Float x) {
  using V = Vector<W>;
  using Float = typename V::Float;
  const auto bits = bits_as<typename V::Unsigned>(x);
  // The exponent such that the mantissa lies around one: 0x3f3504f3 is sqrt(1/2).
  const auto above = bits - 0x3f3504f3u;
  const Float exponent = __builtin_convertvector(bits_as<typename V::Int>(above) >> 23, Float);
  const Float f = bits_as<Float>((above & 0x7fffffu) + 0x3f3504f3u) - 1.f, z = f * f;
  Float p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Float fraction = f + (p * f * z - 0.5f * z - 2.12194440e-4f * exponent);
  const Float result = fraction + 0.693359375f * exponent;
  return (bits & 0x7f800000u) == 0x7f800000u ? x : result;
}

}  // namespace dinov3_ext
