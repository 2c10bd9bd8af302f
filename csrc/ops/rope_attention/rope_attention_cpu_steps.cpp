// The steps between the products of the CPU's attention: rows in and out with rotation, changes of layout, softmax and
// its gradient. One source for all instruction sets; W is the width of a vector in floats.
#include <algorithm>
#include <limits>

#include "core/cpu_amx.h"
#include "ops/rope_attention/rope_attention_cpu.h"

namespace dinov3_ext {
namespace {

// ---- rows in and out ------------------------------------------------------------------------------------------------

// Rows of the table for the token a walk along a sequence has come to: the patch's row and column, without a division.
class Walk {
 public:
  Walk(const Turn& turn, int64_t token) : turn_(turn), patch_(token - turn.prefix) {
    if (patch_ > 0) {
      y_ = patch_ / turn.grid_width;
      x_ = patch_ % turn.grid_width;
    }
  }
  bool turned() const { return patch_ >= 0; }
  const float* table(int part) const {
    return turn_.rope + (part == 0 ? turn_.y_row + y_ : turn_.x_row + x_) * 2 * turn_.quarter;
  }
  void next() {
    if (patch_++ >= 0 && ++x_ == turn_.grid_width) {
      x_ = 0;
      ++y_;
    }
  }

 private:
  const Turn& turn_;
  int64_t patch_, y_ = 0, x_ = 0;
};

template <bool Pairs, int W>
DINOV3_EXT_INLINE void store_word(char* row, int64_t column, typename Vector<W>::Float value) {
#if defined(__x86_64__)
  if constexpr (Pairs && W == 16) {
    typename Vector<W>::Half half;
    asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(value));
    std::memcpy(row + 2 * column, &half, sizeof(half));
    return;
  }
#endif
  store_element<Pairs ? Element::bfloat16 : Element::float32, W>(row, column, value);
}

// Rows of a head lie far apart, where no hardware foresees them. Behind the last row a prefetch does nothing.
constexpr int64_t kRowsAhead = 6;
DINOV3_EXT_INLINE void prefetch_row(const char* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at);
}

template <bool Pairs, Element E, int W>
DINOV3_EXT_INLINE void read_turned(const char* from, int64_t half, const Walk& walk, int64_t quarter, char* to) {
  for (int part = 0; part < 2; ++part) {
    const float* table = walk.table(part);
    for (int64_t e = 0; e < quarter; e += W) {
      const int64_t column = part * quarter + e;
      const auto cosine = load<W>(table + e), sine = load<W>(table + quarter + e);
      const auto low = load_element<E, W>(from, column), high = load_element<E, W>(from, column + half);
      store_word<Pairs, W>(to, column, low * cosine - high * sine);
      store_word<Pairs, W>(to, column + half, high * cosine + low * sine);
    }
  }
}

template <bool Pairs, Element E, int W>
DINOV3_EXT_INLINE void read_rows_of(const ReadRows& args) {
  constexpr bool as_it_is = E == (Pairs ? Element::bfloat16 : Element::float32);
  constexpr int64_t size = Pairs ? 2 : 4, element_size = E == Element::float32 ? 4 : 2;
  const Turn none{};
  Walk walk(args.turn ? *args.turn : none, args.turn ? args.first : -1);
  const int64_t width = args.width, row_bytes = args.row_words * 4;
  char* to = args.to;
  for (int64_t row = 0; row < args.count; ++row, to += row_bytes) {
    const char* from = args.from + row * args.from_row;
    prefetch_row(from + kRowsAhead * args.from_row, width * element_size);
    if (args.turn && walk.turned()) {
      const int64_t quarter = width / 4;
      if (W >= 16 && quarter % 16 == 0) {
        read_turned<Pairs, E, W >= 16 ? 16 : 4>(from, width / 2, walk, quarter, to);
      } else if (W >= 8 && quarter % 8 == 0) {
        read_turned<Pairs, E, W >= 8 ? 8 : 4>(from, width / 2, walk, quarter, to);
      } else {
        read_turned<Pairs, E, 4>(from, width / 2, walk, quarter, to);
      }
    } else {
      for (int64_t e = 0; e < width; e += W) {
        if constexpr (as_it_is && Pairs) {
          std::memcpy(to + e * size, from + e * size, W * size);
        } else {
          store_word<Pairs, W>(to, e, load_element<E, W>(from, e));
        }
      }
    }
    if (row_bytes > width * size) std::memset(to + width * size, 0, static_cast<size_t>(row_bytes - width * size));
    if (args.turn) walk.next();
  }
  std::memset(to, 0, static_cast<size_t>((args.padded - args.count) * row_bytes));
}

template <Element E, int W>
DINOV3_EXT_INLINE void write_turned(const WriteRows& args, const char* from, float factor, const Walk& walk, char* to) {
  const int64_t quarter = args.width / 4, half = args.width / 2;
  const auto factors = splat<W>(factor);
  const float direction = args.inverse ? -1.f : 1.f;
  for (int part = 0; part < 2; ++part) {
    const float* table = walk.table(part);
    for (int64_t e = 0; e < quarter; e += W) {
      const int64_t column = part * quarter + e, other = column + half;
      const auto cosine = load<W>(table + e), sine = load<W>(table + quarter + e) * direction;
      const auto low = load_words<W>(from + column / 16 * args.from_panel + column % 16 * 4) * factors;
      const auto high = load_words<W>(from + other / 16 * args.from_panel + other % 16 * 4) * factors;
      store_element<E, W>(to, column, low * cosine - high * sine);
      store_element<E, W>(to, other, high * cosine + low * sine);
    }
  }
}

template <Element E, int W>
DINOV3_EXT_INLINE void write_rows_of(const WriteRows& args) {
  const Turn none{};
  Walk walk(args.turn ? *args.turn : none, args.turn ? args.first : -1);
  for (int64_t row = 0; row < args.count; ++row) {
    const char* from = args.from + row * kLine;
    char* to = args.to + row * args.to_row;
    const float factor = args.factors ? args.factors[row] : args.factor;
    if (args.turn && walk.turned()) {
      const int64_t quarter = args.width / 4;
      if (W >= 16 && quarter % 16 == 0) {
        write_turned<E, W >= 16 ? 16 : 4>(args, from, factor, walk, to);
      } else if (W >= 8 && quarter % 8 == 0) {
        write_turned<E, W >= 8 ? 8 : 4>(args, from, factor, walk, to);
      } else {
        write_turned<E, 4>(args, from, factor, walk, to);
      }
    } else {
      for (int64_t e = 0; e < args.width; e += W) {
        store_element<E, W>(to, e, load_words<W>(from + e / 16 * args.from_panel + e % 16 * 4) * splat<W>(factor));
      }
    }
    if (args.turn) walk.next();
  }
}

template <Element E, int W>
DINOV3_EXT_INLINE void rotate_row(const char* from, int64_t quarter, const Walk& walk, float direction, char* to) {
  for (int part = 0; part < 2; ++part) {
    const float* table = walk.table(part);
    for (int64_t e = 0; e < quarter; e += W) {
      const int64_t column = part * quarter + e, other = column + 2 * quarter;
      const auto cosine = load<W>(table + e), sine = load<W>(table + quarter + e) * direction;
      const auto low = load_element<E, W>(from, column), high = load_element<E, W>(from, other);
      store_element<E, W>(to, column, low * cosine - high * sine);
      store_element<E, W>(to, other, high * cosine + low * sine);
    }
  }
}

template <Element E, int W>
DINOV3_EXT_INLINE void rotate_rows_of(const RotateRows& args) {
  const int64_t quarter = args.width / 4;
  const float direction = args.inverse ? -1.f : 1.f;
  Walk walk(*args.turn, 0);
  for (int64_t row = 0; row < args.count; ++row, walk.next()) {
    const char* from = args.from + row * args.from_row;
    char* to = args.to + row * args.to_row;
    if (!walk.turned()) {
      std::memcpy(to, from, static_cast<size_t>(args.width * (E == Element::float32 ? 4 : 2)));
    } else if (W >= 16 && quarter % 16 == 0) {
      rotate_row<E, W >= 16 ? 16 : 4>(from, quarter, walk, direction, to);
    } else if (W >= 8 && quarter % 8 == 0) {
      rotate_row<E, W >= 8 ? 8 : 4>(from, quarter, walk, direction, to);
    } else {
      rotate_row<E, 4>(from, quarter, walk, direction, to);
    }
  }
}

// ---- changes of layout ----------------------------------------------------------------------------------------------

// Sixteen squares of 4 x 4 words: as fast as whole rows of 16 (whose shuffles have one port), and the same everywhere.
DINOV3_EXT_INLINE void transpose_block(const char* from, int64_t from_row, char* to, int64_t to_row) {
  using Words = Vector<4>::Int;
  for (int64_t r = 0; r < 16; r += 4) {
    for (int64_t c = 0; c < 16; c += 4) {
      Words in[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&in[i], from + (r + i) * from_row + c * 4, 16);
      const Words a = __builtin_shuffle(in[0], in[1], Words{0, 4, 1, 5});
      const Words b = __builtin_shuffle(in[0], in[1], Words{2, 6, 3, 7});
      const Words d = __builtin_shuffle(in[2], in[3], Words{0, 4, 1, 5});
      const Words e = __builtin_shuffle(in[2], in[3], Words{2, 6, 3, 7});
      const Words out[4] = {__builtin_shuffle(a, d, Words{0, 1, 4, 5}), __builtin_shuffle(a, d, Words{2, 3, 6, 7}),
                            __builtin_shuffle(b, e, Words{0, 1, 4, 5}), __builtin_shuffle(b, e, Words{2, 3, 6, 7})};
      for (int i = 0; i < 4; ++i) std::memcpy(to + (c + i) * to_row + r * 4, &out[i], 16);
    }
  }
}

DINOV3_EXT_INLINE void transpose_blocks(const Transpose& args) {
  for (int64_t block = 0; block < args.blocks; ++block) {
    transpose_block(args.from + block * args.from_block, args.from_row, args.to + block * args.to_block, args.to_row);
  }
}

template <bool Pairs, int W>
DINOV3_EXT_INLINE void stack_panels(const Stack& args) {
  using V = Vector<W>;
  for (int64_t row = 0; row < 16; ++row) {
    const char* from = args.from + (Pairs ? 2 * row : row) * args.from_row;
    char* to = args.to + row * kLine;
    for (int64_t column = 0; column < 16 * args.panels; column += W) {
      char* line = to + column / 16 * args.to_panel + column % 16 * 4;
      if constexpr (Pairs) {
        typename V::Half first, second;
        std::memcpy(&first, from + column * 2, sizeof(first));
        std::memcpy(&second, from + args.from_row + column * 2, sizeof(second));
        const typename V::Unsigned pair = __builtin_convertvector(first, typename V::Unsigned) |
                                          (__builtin_convertvector(second, typename V::Unsigned) << 16);
        std::memcpy(line, &pair, sizeof(pair));
      } else {
        std::memcpy(line, from + column * 4, 4 * W);
      }
    }
  }
}

// Sixteen rows at a time: their partial sums, a line each, are transposed and added.
template <Element E, int W>
DINOV3_EXT_INLINE void row_products_of(const char* a, int64_t a_row, const char* b, int64_t b_row, int64_t width,
                                       int64_t count, float* sums) {
  using Float = typename Vector<W>::Float;
  alignas(kLine) char partial[16 * kLine], turned[16 * kLine];
  for (int64_t first = 0; first < count; first += 16) {
    for (int64_t row = first; row < first + 16; ++row) {
      Float line[16 / W] = {};
      for (int64_t e = 0; row < count && e < width; e += 16) {
        for (int j = 0; j < 16 / W; ++j) {
          line[j] += load_element<E, W>(a + row * a_row, e + j * W) * load_element<E, W>(b + row * b_row, e + j * W);
        }
      }
      std::memcpy(partial + (row - first) * kLine, line, sizeof(line));
    }
    transpose_block(partial, kLine, turned, kLine);
    for (int64_t lane = 0; lane < 16; lane += W) {
      Float sum = load_words<W>(turned + lane * 4);
      for (int64_t row = 1; row < 16; ++row) sum += load_words<W>(turned + row * kLine + lane * 4);
      store<W>(sums + first + lane, sum);
    }
  }
}

// ---- softmax --------------------------------------------------------------------------------------------------------

// Two vectors of floats as bf16, one after the other: 32 numbers of one line.
template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Int join(typename Vector<W>::Float first, typename Vector<W>::Float second) {
  typename Vector<W>::Int line{};
#if defined(__x86_64__)
  if constexpr (W == 16) asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(line) : "v"(first), "v"(second));
#endif
  return line;
}

// Two vectors of floats as bf16, lane by lane: 16 pairs.
template <int W>
DINOV3_EXT_INLINE typename Vector<W>::Int pair_lanes(typename Vector<W>::Float first,
                                                     typename Vector<W>::Float second) {
  typename Vector<W>::Int pairs{};
#if defined(__x86_64__)
  if constexpr (W == 16) {
    static constexpr struct alignas(64) Order {
      uint16_t lane[32];
      constexpr Order() : lane() {
        for (int i = 0; i < 32; ++i) lane[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
      }
    } order;
    typename Vector<16>::Int lanes;
    std::memcpy(&lanes, &order, sizeof(lanes));
    asm("vpermw %1, %2, %0" : "=v"(pairs) : "v"(join<W>(first, second)), "v"(lanes));
  }
#endif
  return pairs;
}

template <bool Pairs, int W>
DINOV3_EXT_INLINE void softmax_lanes(const Softmax& args, char* scores, char* weights, float* maxima, float* sums,
                                     char* out) {
  using Float = typename Vector<W>::Float;
  const Float lowest = splat<W>(-std::numeric_limits<float>::infinity()), zero = splat<W>(0.f);
  const Float scale = splat<W>(args.scale);
  Float highest[4] = {args.first ? lowest : load<W>(maxima), lowest, lowest, lowest};
  int64_t key = 0;
  for (; key + 4 <= args.keys; key += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) highest[i] = larger<W>(highest[i], load_words<W>(scores + (key + i) * kLine));
  }
  for (; key < args.keys; ++key) highest[0] = larger<W>(highest[0], load_words<W>(scores + key * kLine));
  const Float maximum = larger<W>(larger<W>(highest[0], highest[1]), larger<W>(highest[2], highest[3]));
  const Float shift = maximum * scale;
  Float sum[2] = {zero, zero};
  for (key = 0; key + 2 <= args.keys; key += 2) {
    const Float first = exp2<W>(load_words<W>(scores + key * kLine) * scale - shift);
    const Float second = exp2<W>(load_words<W>(scores + key * kLine + kLine) * scale - shift);
    sum[0] += first;
    sum[1] += second;
    if constexpr (Pairs) {
      const auto pairs = pair_lanes<W>(first, second);
      std::memcpy(weights + key / 2 * kLine, &pairs, sizeof(pairs));
    } else {
      std::memcpy(weights + key * kLine, &first, sizeof(first));
      std::memcpy(weights + key * kLine + kLine, &second, sizeof(second));
    }
  }
  if (key < args.keys) {
    const Float last = exp2<W>(load_words<W>(scores + key * kLine) * scale - shift);
    sum[0] += last;
    if constexpr (Pairs) {
      const auto pairs = pair_lanes<W>(last, zero);
      std::memcpy(weights + key / 2 * kLine, &pairs, sizeof(pairs));
    } else {
      std::memcpy(weights + key * kLine, &last, sizeof(last));
    }
  }
  for (int64_t word = Pairs ? (args.keys + 1) / 2 : args.keys; word < args.padded_words; ++word) {
    std::memcpy(weights + word * kLine, &zero, sizeof(zero));
  }
  if (!args.first) {
    const Float correction = exp2<W>(load<W>(maxima) * scale - shift);
    sum[0] += load<W>(sums) * correction;
    for (int64_t row = 0; row < args.out_rows; ++row) {
      const Float corrected = load_words<W>(out + row * kLine) * correction;
      std::memcpy(out + row * kLine, &corrected, sizeof(corrected));
    }
  }
  store<W>(maxima, maximum);
  store<W>(sums, sum[0] + sum[1]);
}

template <bool Pairs, int W>
DINOV3_EXT_INLINE void softmax_panels(const Softmax& args) {
  for (int64_t panel = 0; panel < args.panels; ++panel) {
    for (int64_t lane = 0; lane < 16; lane += W) {
      softmax_lanes<Pairs, W>(args, args.scores + panel * args.scores_panel + lane * 4,
                              args.weights + panel * args.weights_panel + lane * 4, args.maxima + panel * 16 + lane,
                              args.sums + panel * 16 + lane, args.out + panel * args.out_panel + lane * 4);
    }
  }
}

// ---- gradient of the softmax ----------------------------------------------------------------------------------------

template <int W>
DINOV3_EXT_INLINE void score_gradient_words(const ScoreGradient& args) {
  using Float = typename Vector<W>::Float;
  const Float scale = splat<W>(args.scale), zero = splat<W>(0.f);
  for (int64_t panel = 0; panel < args.panels; ++panel) {
    for (int64_t lane = 0; lane < 16; lane += W) {
      char* scores = args.scores + panel * args.panel + lane * 4;
      char* weights_grad = args.weights_grad + panel * args.panel + lane * 4;
      const Float lse = load<W>(args.lse + panel * 16 + lane), delta = load<W>(args.delta + panel * 16 + lane);
      for (int64_t key = 0; key < args.keys; ++key) {
        const Float weight = exp2<W>(load_words<W>(scores + key * kLine) * scale - lse);
        const Float gradient = weight * (load_words<W>(weights_grad + key * kLine) - delta);
        std::memcpy(scores + key * kLine, &weight, sizeof(weight));
        std::memcpy(weights_grad + key * kLine, &gradient, sizeof(gradient));
      }
      for (int64_t key = args.keys; key < args.padded_rows; ++key) {
        std::memcpy(scores + key * kLine, &zero, sizeof(zero));
        std::memcpy(weights_grad + key * kLine, &zero, sizeof(zero));
      }
    }
  }
}

// Up to two keys x two panels: a line of a left operand holds 32 queries, a word of the right one two keys. What is not
// there becomes zero.
template <int W, int Keys, int Panels>
DINOV3_EXT_INLINE void score_gradient_square(const ScoreGradient& args, int64_t panel, int64_t key) {
  using Float = typename Vector<W>::Float;
  const Float scale = splat<W>(args.scale), zero = splat<W>(0.f);
  Float weight[2][2] = {{zero, zero}, {zero, zero}}, gradient[2][2] = {{zero, zero}, {zero, zero}};
#pragma GCC unroll 2
  for (int j = 0; j < Panels; ++j) {
    const char* scores = args.scores + (panel + j) * args.panel + key * kLine;
    const char* weights_grad = args.weights_grad + (panel + j) * args.panel + key * kLine;
    const Float lse = load<W>(args.lse + (panel + j) * 16), delta = load<W>(args.delta + (panel + j) * 16);
#pragma GCC unroll 2
    for (int i = 0; i < Keys; ++i) {
      weight[i][j] = exp2<W>(load_words<W>(scores + i * kLine) * scale - lse);
      gradient[i][j] = weight[i][j] * (load_words<W>(weights_grad + i * kLine) - delta);
    }
    const auto pairs = pair_lanes<W>(gradient[0][j], gradient[1][j]);
    std::memcpy(args.right + (panel + j) * args.right_panel + key / 2 * kLine, &pairs, sizeof(pairs));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const auto weights = join<W>(weight[i][0], weight[i][1]), gradients = join<W>(gradient[i][0], gradient[i][1]);
    const int64_t at = panel / 2 * args.left_line + (key + i) * kLine;
    std::memcpy(args.weights + at, &weights, sizeof(weights));
    std::memcpy(args.left + at, &gradients, sizeof(gradients));
  }
}

template <int W, int Panels>
DINOV3_EXT_INLINE void score_gradient_of_panels(const ScoreGradient& args, int64_t panel) {
  int64_t key = 0;
  for (; key + 2 <= args.keys; key += 2) score_gradient_square<W, 2, Panels>(args, panel, key);
  if (key < args.keys) score_gradient_square<W, 1, Panels>(args, panel, key), key += 2;
  for (; key < args.padded_rows; key += 2) score_gradient_square<W, 0, Panels>(args, panel, key);
  const auto zero = splat<W>(0.f);
  for (int j = 0; j < Panels; ++j) {
    for (int64_t word = key / 2; word < args.padded_words; ++word) {
      std::memcpy(args.right + (panel + j) * args.right_panel + word * kLine, &zero, sizeof(zero));
    }
  }
}

template <int W>
DINOV3_EXT_INLINE void score_gradient_pairs(const ScoreGradient& args) {
  int64_t panel = 0;
  for (; panel + 2 <= args.panels; panel += 2) score_gradient_of_panels<W, 2>(args, panel);
  if (panel < args.panels) score_gradient_of_panels<W, 1>(args, panel);
}

// ---- one table per instruction set ----------------------------------------------------------------------------------

template <bool Pairs, int W>
DINOV3_EXT_INLINE void read_rows_any(const ReadRows& args) {
  if (Pairs || args.element == Element::bfloat16) return read_rows_of<Pairs, Element::bfloat16, W>(args);
  if (args.element == Element::float32) return read_rows_of<Pairs, Element::float32, W>(args);
  return read_rows_of<Pairs, Element::float16, W>(args);
}

template <int W>
DINOV3_EXT_INLINE void write_rows_any(const WriteRows& args) {
  switch (args.element) {
    case Element::float32: return write_rows_of<Element::float32, W>(args);
    case Element::bfloat16: return write_rows_of<Element::bfloat16, W>(args);
    case Element::float16: return write_rows_of<Element::float16, W>(args);
  }
}

template <int W>
DINOV3_EXT_INLINE void rotate_rows_any(const RotateRows& args) {
  switch (args.element) {
    case Element::float32: return rotate_rows_of<Element::float32, W>(args);
    case Element::bfloat16: return rotate_rows_of<Element::bfloat16, W>(args);
    case Element::float16: return rotate_rows_of<Element::float16, W>(args);
  }
}

template <int W>
DINOV3_EXT_INLINE void row_products_any(Element element, const char* a, int64_t a_row, const char* b, int64_t b_row,
                                        int64_t width, int64_t count, float* sums) {
  switch (element) {
    case Element::float32: return row_products_of<Element::float32, W>(a, a_row, b, b_row, width, count, sums);
    case Element::bfloat16: return row_products_of<Element::bfloat16, W>(a, a_row, b, b_row, width, count, sums);
    case Element::float16: return row_products_of<Element::float16, W>(a, a_row, b, b_row, width, count, sums);
  }
}

// The functions of one table, compiled for `target`.
#define DINOV3_EXT_ATTENTION_STEPS(name, target, pairs, width)                                                   \
  struct name {                                                                                                  \
    target static void read_rows(const ReadRows& args) { read_rows_any<pairs, width>(args); }                    \
    target static void write_rows(const WriteRows& args) { write_rows_any<width>(args); }                        \
    target static void rotate_rows(const RotateRows& args) { rotate_rows_any<width>(args); }                     \
    target static void transpose(const Transpose& args) { transpose_blocks(args); }                              \
    target static void stack(const Stack& args) { stack_panels<pairs, width>(args); }                            \
    target static void softmax(const Softmax& args) { softmax_panels<pairs, width>(args); }                      \
    target static void score_gradient(const ScoreGradient& args) {                                               \
      if constexpr (pairs) {                                                                                     \
        score_gradient_pairs<width>(args);                                                                       \
      } else {                                                                                                   \
        score_gradient_words<width>(args);                                                                       \
      }                                                                                                          \
    }                                                                                                            \
    target static void row_products(Element element, const char* a, int64_t a_row, const char* b, int64_t b_row, \
                                    int64_t columns, int64_t count, float* sums) {                               \
      row_products_any<width>(element, a, a_row, b, b_row, columns, count, sums);                                \
    }                                                                                                            \
  }

template <class Steps>
constexpr AttentionKernels table(void (*multiply)(const Product&), int64_t pair, int64_t row_step, bool tiles) {
  return {pair,
          row_step,
          tiles ? kLineWords : 1,
          tiles,
          multiply,
          Steps::read_rows,
          Steps::write_rows,
          Steps::rotate_rows,
          Steps::transpose,
          Steps::stack,
          Steps::softmax,
          Steps::score_gradient,
          Steps::row_products};
}

#define DINOV3_EXT_ANYWHERE
DINOV3_EXT_ATTENTION_STEPS(PortableSteps, DINOV3_EXT_ANYWHERE, false, 4);
#if defined(__x86_64__)
DINOV3_EXT_ATTENTION_STEPS(Avx2Steps, DINOV3_EXT_AVX2, false, 8);
DINOV3_EXT_ATTENTION_STEPS(Avx512Steps, DINOV3_EXT_AVX512, false, 16);
DINOV3_EXT_ATTENTION_STEPS(PairSteps, DINOV3_EXT_AVX512_BF16, true, 16);
#endif

}  // namespace

const AttentionKernels& attention_kernels(Element element) {
  static constexpr AttentionKernels portable = table<PortableSteps>(multiply_portable, 1, 2, false);
#if defined(__x86_64__)
  static constexpr AttentionKernels avx2 = table<Avx2Steps>(multiply_avx2, 1, 4, false);
  static constexpr AttentionKernels avx512 = table<Avx512Steps>(multiply_avx512, 1, 8, false);
  static constexpr AttentionKernels pairs = table<PairSteps>(multiply_pairs, 2, 8, false);
  static constexpr AttentionKernels amx = table<PairSteps>(multiply_amx, 2, 16, true);
  const CpuVariant variant = cpu_variant();
  if (element == Element::bfloat16 && variant >= CpuVariant::amx) return amx;
  if (element == Element::bfloat16 && variant >= CpuVariant::avx512_bf16) return pairs;
  // fp32 as sums of three bf16 parts, six products on AMX tiles, is no faster: 15.8 against 17.1 ms at 4 x 261 tokens.
  if (variant >= CpuVariant::avx512) return avx512;
  if (variant >= CpuVariant::avx2) return avx2;
#endif
  (void)element;
  return portable;
}

}  // namespace dinov3_ext
