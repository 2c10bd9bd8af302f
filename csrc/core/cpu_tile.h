// Products of small fp32 matrices whose sides are packed for it: a tile of the result stays in registers while the
// depth is walked. (cpu_product.h: operands that lie in lines, in any number type.)
//
// The tile is kTileRows x 2 vectors: 24 accumulators of AVX-512's 32 registers (or 12 of 16), so that each step makes
// one multiply-add for each accumulator from two loads and one broadcast a row.
#pragma once

#include <cstdint>
#include <utility>

#include "core/cpu_product.h"
#include "core/cpu_vector.h"

namespace dinov3_ext {

template <int W>
inline constexpr int kTileRows = W == 16 ? 12 : 6;
template <int W>
inline constexpr int kTileColumns = 2 * W;

// c[m][n] (+)= sum over k < depth of a[m][k] b[k][n], Rows x 2W. `b` is packed (depth, 2W). `a` is packed as
// (Rows, APitch), or with Across as (depth, kTileRows<W>).
template <int W, int Rows, int APitch, bool Across>
DINOV3_EXT_INLINE void product_tile_of(const float* a, const float* b, int64_t depth, float* c, int64_t c_pitch,
                                       bool add) {
  using Float = typename Vector<W>::Float;
  Float sum[Rows][2];
#pragma GCC unroll 12
  for (int m = 0; m < Rows; ++m) sum[m][0] = sum[m][1] = splat<W>(0.f);
  for (int64_t k = 0; k < depth; ++k) {
    const Float first = load<W>(b), second = load<W>(b + W);
#pragma GCC unroll 12
    for (int m = 0; m < Rows; ++m) {
      const Float one = broadcast_word<W>(reinterpret_cast<const char*>(a + (Across ? m : m * APitch)));
      sum[m][0] += one * first;
      sum[m][1] += one * second;
    }
    a += Across ? kTileRows<W> : 1;
    b += 2 * W;
  }
#pragma GCC unroll 12
  for (int m = 0; m < Rows; ++m) {
    float* to = c + m * c_pitch;
    store<W>(to, add ? sum[m][0] + load<W>(to) : sum[m][0]);
    store<W>(to + W, add ? sum[m][1] + load<W>(to + W) : sum[m][1]);
  }
}

// The same for 1 to kTileRows<W> rows; `a` and `c` have space for the next multiple of a third of kTileRows<W>.
template <int W, int APitch, bool Across>
DINOV3_EXT_INLINE void product_tile(int64_t rows, const float* a, const float* b, int64_t depth, float* c,
                                    int64_t c_pitch, bool add) {
  constexpr int third = kTileRows<W> / 3;
  if (rows > 2 * third) {
    product_tile_of<W, 3 * third, APitch, Across>(a, b, depth, c, c_pitch, add);
  } else if (rows > third) {
    product_tile_of<W, 2 * third, APitch, Across>(a, b, depth, c, c_pitch, add);
  } else {
    product_tile_of<W, third, APitch, Across>(a, b, depth, c, c_pitch, add);
  }
}

// Transposes W vectors in place: log2 W rounds that interleave the first half with the second.
namespace detail {
template <int W, int... Lane>
DINOV3_EXT_INLINE void interleave(const typename Vector<W>::Float* from, typename Vector<W>::Float* to,
                                  std::integer_sequence<int, Lane...>) {
#pragma GCC unroll 8
  for (int i = 0; i < W / 2; ++i) {
    to[2 * i] = __builtin_shufflevector(from[i], from[i + W / 2], Lane / 2 + Lane % 2 * W...);
    to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + W / 2], W / 2 + Lane / 2 + Lane % 2 * W...);
  }
}
}  // namespace detail

template <int W>
DINOV3_EXT_INLINE void transpose(typename Vector<W>::Float* rows) {
  typename Vector<W>::Float other[W];
  constexpr auto lanes = std::make_integer_sequence<int, W>();
  detail::interleave<W>(rows, other, lanes);
  detail::interleave<W>(other, rows, lanes);
  if constexpr (W == 16) {
    detail::interleave<W>(rows, other, lanes);
    detail::interleave<W>(other, rows, lanes);
  }
  if constexpr (W == 8) {
    detail::interleave<W>(rows, other, lanes);
    for (int i = 0; i < W; ++i) rows[i] = other[i];
  }
}

}  // namespace dinov3_ext
