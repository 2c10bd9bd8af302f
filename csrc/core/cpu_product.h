// Blocked products for the CPU kernels: result (rows, 16 panels) (+)= left (rows, K) right (K, 16 panels), sums in
// fp32.
//
// Everything is cut into lines of 64 bytes, 16 words of 32 bits: a word is one float, or two bf16 that are neighbours
// along K. So one layout serves fp32 products, products of bf16 pairs, and AMX tiles (16 lines are one tile):
//   left    row r, words 16 l .. 16 l + 15 along K: one line at left + r * left_row + l * left_line
//   right   panel p, word k along K, 16 columns:    one line at right + p * right_panel + k * 64
//   result  panel p, row r, 16 columns of floats:   one line at result + p * result_panel + r * 64
// A result can therefore be the left operand of a product along its columns (panels are then lines of K), or the right
// operand of one along its rows, where it lies.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "core/cpu_variant.h"
#include "core/cpu_vector.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dinov3_ext {

constexpr int64_t kLine = 64;       // bytes
constexpr int64_t kLineWords = 16;  // words of 32 bits

template <class T>
struct Buffer {  // aligned to a cache line, not initialised
  T* data;
#if defined(__SANITIZE_ADDRESS__)  // sees a line behind the end only of what is allocated to the byte
  explicit Buffer(int64_t count) : data(static_cast<T*>(operator new(sizeof(T) * count, std::align_val_t(64)))) {}
  ~Buffer() { operator delete(data, std::align_val_t(64)); }
#else  // glibc before 2.38 does not use freed memory again for aligned allocations: the peak grows by half
  explicit Buffer(int64_t count) : whole_(operator new(sizeof(T) * count + 63)) {
    data = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(whole_) + 63) / 64 * 64);
  }
  ~Buffer() { operator delete(whole_); }
#endif
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

#if !defined(__SANITIZE_ADDRESS__)
 private:
  void* whole_;
#endif
};

struct Product {
  const char* left;
  int64_t left_row, left_line;  // bytes
  const char* right;
  int64_t right_panel;  // bytes
  char* result;
  int64_t result_panel;  // bytes
  int64_t rows;          // a multiple of the tile
  int64_t panels;
  int64_t words;  // along K; AMX: a multiple of the tile
  bool add;       // to what `result` holds
};

template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float load_words(const char* from) {
  typename Vector<W>::Float to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// One word into every lane. In assembly where it counts: GCC 12 adds a zero or blends lane by lane (twice the time).
template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Float broadcast_word(const char* from) {
  typename Vector<W>::Float to;
#if defined(__x86_64__)
  typedef float Word __attribute__((may_alias));
  if constexpr (W == 16) {
    asm("vbroadcastss %1, %0" : "=v"(to) : "m"(*reinterpret_cast<const Word*>(from)));
    return to;
  } else if constexpr (W == 8) {
    asm("vbroadcastss %1, %0" : "=x"(to) : "m"(*reinterpret_cast<const Word*>(from)));
    return to;
  }
#endif
  float word;
  std::memcpy(&word, from, sizeof(word));
  for (int lane = 0; lane < W; ++lane) to[lane] = word;
  return to;
}

// sum += left right, word by word: one fp32 product (a fused multiply-add where there is one) or two of bf16.
template <bool Pairs, int W>
DINOV3_EXT_INLINE void multiply_add(typename Vector<W>::Float& sum, typename Vector<W>::Float left,
                                    typename Vector<W>::Float right) {
#if defined(__x86_64__)
  if constexpr (Pairs) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
    return;
  }
#endif
  sum += left * right;
}

// A tile of the result: Rows x Panels, in registers.
template <bool Pairs, int W, int Rows, int Panels>
DINOV3_EXT_INLINE void multiply_tile(const Product& product, int64_t row, int64_t panel) {
  constexpr int V = 16 / W, N = Panels * V;  // vectors of a line, of a row of the tile
  using Float = typename Vector<W>::Float;
  Float sums[Rows][N] = {};
  const char* left_line = product.left + row * product.left_row;
  const char* right = product.right + panel * product.right_panel;
  for (int64_t first = 0; first < product.words; first += kLineWords, left_line += product.left_line) {
    const char* left = left_line;
    const int64_t words = product.words - first < kLineWords ? product.words - first : kLineWords;
    for (int64_t k = 0; k < words; ++k, left += 4, right += kLine) {
      Float columns[N];
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) {
        columns[j] = load_words<W>(right + j / V * product.right_panel + j % V * (4 * W));
      }
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const Float word = broadcast_word<W>(left + i * product.left_row);
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) multiply_add<Pairs, W>(sums[i][j], word, columns[j]);
      }
    }
  }
  char* result = product.result + panel * product.result_panel + row * kLine;
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      char* to = result + j / V * product.result_panel + i * kLine + j % V * (4 * W);
      if (product.add) sums[i][j] += load_words<W>(to);
      std::memcpy(to, &sums[i][j], sizeof(Float));
    }
  }
}

// The rows of some panels of the result. Panels outside, rows inside: the words of the panels' right operand stay in
// the first cache.
template <bool Pairs, int W, int Rows, int Panels>
DINOV3_EXT_INLINE int64_t multiply_panels(const Product& product, int64_t panel) {
  for (; panel + Panels <= product.panels; panel += Panels) {
    for (int64_t row = 0; row < product.rows; row += Rows) multiply_tile<Pairs, W, Rows, Panels>(product, row, panel);
  }
  return panel;
}

// Sixteen sums in 32 registers, and the fewer loads the squarer: 4 x 4 makes 181 to 191 GFLOP/s in fp32 where 8 x 2
// makes 173, 16 x 1 140 to 160, and 6 x 4, 8 x 3 or 12 x 2 no more (one core of 2.6 GHz with AMX, benchmarks/FACTS.md).
template <bool Pairs>
DINOV3_EXT_INLINE void multiply_lines_of_16(const Product& product) {
  int64_t panel = multiply_panels<Pairs, 16, 4, 4>(product, 0);
  panel = multiply_panels<Pairs, 16, 8, 2>(product, panel);
  multiply_panels<Pairs, 16, 8, 1>(product, panel);
}

// Tiles that leave room in 16 registers.
inline void multiply_portable(const Product& product) { multiply_panels<false, 4, 2, 1>(product, 0); }
#if defined(__x86_64__)
DINOV3_EXT_AVX2 inline void multiply_avx2(const Product& product) { multiply_panels<false, 8, 4, 1>(product, 0); }
DINOV3_EXT_AVX512 inline void multiply_avx512(const Product& product) { multiply_lines_of_16<false>(product); }
DINOV3_EXT_AVX512_BF16 inline void multiply_pairs(const Product& product) { multiply_lines_of_16<true>(product); }
#endif

}  // namespace dinov3_ext
