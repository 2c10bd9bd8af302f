// Long rows of logits, two vectors at a time, and exponentials of them.
//
// 16-bit elements come apart without a shuffle: a vector of pairs gives the even elements by a shift and the odd ones
// by a mask. So the two vectors hold elements in an order of their own; sums do not mind, and what must line up goes
// through load_two_of. fp32 elements stay in order.
#pragma once

#include <utility>

#include "core/cpu_vector.h"

namespace dinov3_ext {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

inline int64_t size_of(Element element) { return element == Element::float32 ? 4 : 2; }

template <int W>
struct Two {
  typename Vector<W>::Float first, second;
};

// The 2W elements from `index` on.
template <Element E, int W>
DINOV3_EXT_INLINE Two<W> load_two(const void* base, int64_t index) {
  using V = Vector<W>;
  if constexpr (E == Element::float32) {
    const float* from = static_cast<const float*>(base) + index;
    return {load<W>(from), load<W>(from + W)};
  } else {
    typename V::Unsigned pairs;
    std::memcpy(&pairs, static_cast<const uint16_t*>(base) + index, sizeof(pairs));
    if constexpr (E == Element::bfloat16) {
      return {bits_as<typename V::Float>(pairs << 16), bits_as<typename V::Float>(pairs & 0xffff0000u)};
    }
    return {widened_float16<W>(pairs & 0xffffu), widened_float16<W>(pairs >> 16)};
  }
}

// Asks for the line of the 2W elements from `index` on. Where several rows are read in turn, a page of each, the
// processor's own prefetching starts anew with every page.
template <Element E, int W>
DINOV3_EXT_INLINE void prefetch_two(const void* base, int64_t index) {
  constexpr int64_t size = E == Element::float32 ? 4 : 2;
  const char* from = static_cast<const char*>(base) + index * size;
  __builtin_prefetch(from);
  if constexpr (2 * W * size > 64) __builtin_prefetch(from + 64);
}

// The last `count` < 2W elements of a row, zero behind them.
template <Element E, int W>
DINOV3_EXT_INLINE Two<W> load_two_tail(const void* base, int64_t index, int64_t count) {
  constexpr int64_t size = E == Element::float32 ? 4 : 2;
  char padded[2 * W * size] = {};
  std::memcpy(padded, static_cast<const char*>(base) + index * size, static_cast<size_t>(count * size));
  return load_two<E, W>(padded, 0);
}

template <Element E, int W>
DINOV3_EXT_INLINE void store_two(void* base, int64_t index, Two<W> value) {
  if constexpr (E == Element::float32) {
    float* to = static_cast<float*>(base) + index;
    store<W>(to, value.first);
    store<W>(to + W, value.second);
  } else {
    const auto pairs = rounded<E, W>(value.first) | rounded<E, W>(value.second) << 16;
    std::memcpy(static_cast<uint16_t*>(base) + index, &pairs, sizeof(pairs));
  }
}

template <Element E, int W>
DINOV3_EXT_INLINE void store_two_tail(void* base, int64_t index, Two<W> value, int64_t count) {
  constexpr int64_t size = E == Element::float32 ? 4 : 2;
  char padded[2 * W * size];
  store_two<E, W>(padded, 0, value);
  std::memcpy(static_cast<char*>(base) + index * size, padded, static_cast<size_t>(count * size));
}

namespace detail {

template <int W, int... Lane>
DINOV3_EXT_INLINE Two<W> apart(Two<W> ordered, std::integer_sequence<int, Lane...>) {
  return {__builtin_shufflevector(ordered.first, ordered.second, 2 * Lane...),
          __builtin_shufflevector(ordered.first, ordered.second, 2 * Lane + 1 ...)};
}

template <int W, int... Lane>
DINOV3_EXT_INLINE Two<W> together(Two<W> parted, std::integer_sequence<int, Lane...>) {
  return {__builtin_shufflevector(parted.first, parted.second, Lane / 2 + Lane % 2 * W...),
          __builtin_shufflevector(parted.first, parted.second, W / 2 + Lane / 2 + Lane % 2 * W...)};
}

}  // namespace detail

// 2W floats in the order in which load_two<E, W> gives elements.
template <Element E, int W>
DINOV3_EXT_INLINE Two<W> load_two_of(const float* from) {
  const Two<W> ordered{load<W>(from), load<W>(from + W)};
  if constexpr (E == Element::float32) return ordered;
  return detail::apart<W>(ordered, std::make_integer_sequence<int, W>());
}

// scale x + base y + shift as if rounded once or twice: the terms are large, their sum is a small exponent. Two fused
// multiply-adds; without them, in fp64.
template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float exponent(float scale, typename Vector<W>::Float x, float base,
                                                     typename Vector<W>::Float y, float shift) {
#if !defined(__FMA__) && !defined(__aarch64__)
  if constexpr (W == 4) {  // the portable vectors; wider ones belong to functions that have the instruction
    typedef double Wide __attribute__((vector_size(8 * W)));
    const Wide sum = __builtin_convertvector(x, Wide) * double(scale) + __builtin_convertvector(y, Wide) * double(base);
    return __builtin_convertvector(sum + double(shift), typename Vector<W>::Float);
  }
#endif
  return x * scale + (y * base + splat<W>(shift));
}

template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float exponent(float scale, typename Vector<W>::Float x, float shift) {
#if !defined(__FMA__) && !defined(__aarch64__)
  if constexpr (W == 4) return exponent<W>(scale, x, 0.f, splat<W>(0.f), shift);
#endif
  return x * scale + splat<W>(shift);
}

// The inverse of load_two_of.
template <Element E, int W>
DINOV3_EXT_INLINE void store_two_of(float* to, Two<W> value) {
  if constexpr (E != Element::float32) value = detail::together<W>(value, std::make_integer_sequence<int, W>());
  store<W>(to, value.first);
  store<W>(to + W, value.second);
}

// Where the first `count` of 2W elements are: all bits set.
template <Element E, int W>
DINOV3_EXT_INLINE void first_of_two(int64_t count, typename Vector<W>::Int& first, typename Vector<W>::Int& second) {
  constexpr bool ordered = E == Element::float32;
  for (int lane = 0; lane < W; ++lane) {
    first[lane] = (ordered ? lane : 2 * lane) < count ? -1 : 0;
    second[lane] = (ordered ? lane + W : 2 * lane + 1) < count ? -1 : 0;
  }
}

// While one lives, this thread's results below the smallest normal float become zero. Without it each vector of
// exponentials with such a lane takes 200 cycles where one takes 5.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8040u); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned before_;
#endif
};

// 2^(x stretch) under FlushDenormals, as exp2: zero below 2^-126, infinity (AVX-512) or 2^127 from 2^128 on, NaN stays
// NaN. `stretch` is within 1e-5 of one and costs nothing: it takes part where the whole part is taken off.
template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float exp2_stretched(typename Vector<W>::Float x,
                                                           typename Vector<W>::Float stretch) {
  using V = Vector<W>;
  using Float = typename V::Float;
  constexpr bool scales = W == 16;                             // vscalefps
  constexpr float rounder = 12582912.f;                        // as in exp2
  Float t = larger<W>(x, splat<W>(scales ? -200.f : -127.f));  // -inf - -inf would be NaN
  if constexpr (!scales) t = smaller<W>(t, splat<W>(127.f));
  const Float shifted = t + rounder, whole = shifted - rounder;
  const Float f = t * stretch - whole;
  Float p = 1.535336188319500e-4f * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.f;
#if defined(__x86_64__)
  if constexpr (scales) {
    asm("vscalefps %1, %0, %0" : "+v"(p) : "v"(whole));
    return p;
  }
#endif
  return p * bits_as<Float>((bits_as<typename V::Int>(shifted) + 127) << 23);
}

template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float exp2_flushed(typename Vector<W>::Float x) {
  return exp2_stretched<W>(x, splat<W>(1.f));
}

}  // namespace dinov3_ext
