// Sinkhorn-Knopp on the CPU. Each round reads the logits once and makes one exponential of each: one rank alone takes
// all rows of some columns, whose exponentials stay in the cache between the columns' sums and their share of the
// rows'; ranks that exchange in between take rows, whose exponentials stay between their sum and their share of the
// column sums, behind a first step over columns. Work is cut by shape, never by the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "core/cpu_logits.h"
#include "core/cpu_variant.h"
#include "ops/sinkhorn_knopp/sinkhorn_knopp.h"

namespace dinov3_ext {
namespace {

constexpr int64_t kRowsAtOnce = 8;              // rows between two corrections of the running column maximum
constexpr int64_t kColumnsAtOnce = 1024;        // columns whose partial sum is taken before it joins the row's sum
constexpr int64_t kRowsKept = 4;                // rows whose exponentials are kept until they join the column sums
constexpr int64_t kExponentialsKept = 1 << 18;  // 1 MB, half of a second-level cache
constexpr float kSmallest = 0x1p-60f, kLargest = 0x1p60f;  // row sums outside: the guess of the shift was not good

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

const void* row_of(const SinkhornLogits& logits, int64_t row) {
  return static_cast<const char*>(logits.data) + row * logits.row_stride * size_of(logits.element);
}

// ---- column sums: a tile of columns, all rows ----

// Adds up to kRowsAtOnce rows to the running maxima (in units of log2) and sums of 2W columns.
template <Element E, int W>
DINOV3_EXT_INLINE void column_step(const SinkhornLogits& logits, int64_t first, int64_t rows, int64_t column,
                                   int64_t count, float* maxima, float* sums) {
  using Float = typename Vector<W>::Float;
  const Float lowest = splat<W>(-std::numeric_limits<float>::infinity()), zero = splat<W>(0.f);
  Two<W> before{lowest, lowest}, sum{zero, zero}, x[kRowsAtOnce];
  if (first > 0) before = load_two_of<E, W>(maxima), sum = load_two_of<E, W>(sums);
  Two<W> maximum = before;
  for (int64_t i = 0; i < rows; ++i) {
    const void* row = row_of(logits, first + i);
    x[i] = count == 2 * W ? load_two<E, W>(row, column) : load_two_tail<E, W>(row, column, count);
    x[i].first *= logits.scale, x[i].second *= logits.scale;
    prefetch_two<E, W>(row_of(logits, first + i), column + kColumnsAtOnce);
    maximum.first = larger<W>(maximum.first, x[i].first);
    maximum.second = larger<W>(maximum.second, x[i].second);
  }
  // -inf - -inf would be NaN
  const Two<W> shift{maximum.first == lowest ? zero : maximum.first, maximum.second == lowest ? zero : maximum.second};
  sum.first *= exp2_flushed<W>(before.first - shift.first);
  sum.second *= exp2_flushed<W>(before.second - shift.second);
  for (int64_t i = 0; i < rows; ++i) {
    sum.first += exp2_flushed<W>(x[i].first - shift.first);
    sum.second += exp2_flushed<W>(x[i].second - shift.second);
  }
  store_two_of<E, W>(maxima, maximum);
  store_two_of<E, W>(sums, sum);
}

// A tile of columns: all rows, a few at a time, so that each row is read in long runs.
template <Element E, int W>
DINOV3_EXT_INLINE void column_tile(const SinkhornColumnSums& args, int64_t begin, int64_t end) {
  const int64_t whole = begin + (end - begin) / (2 * W) * (2 * W);
  float maxima[2 * W] = {}, sums[2 * W] = {};  // of the last columns
  for (int64_t first = 0; first < args.logits.rows; first += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, args.logits.rows - first);
    for (int64_t k = begin; k < whole; k += 2 * W) {
      if (rows == kRowsAtOnce) {
        column_step<E, W>(args.logits, first, kRowsAtOnce, k, 2 * W, args.maxima + k, args.sums + k);
      } else {
        column_step<E, W>(args.logits, first, rows, k, 2 * W, args.maxima + k, args.sums + k);
      }
    }
    if (whole < end) column_step<E, W>(args.logits, first, rows, whole, end - whole, maxima, sums);
  }
  std::copy(maxima, maxima + (end - whole), args.maxima + whole);
  std::copy(sums, sums + (end - whole), args.sums + whole);
  for (int64_t k = begin; k < end; ++k) {
    if (args.logits.rows == 0) args.sums[k] = 0;
    args.maxima[k] = args.logits.rows == 0 ? -std::numeric_limits<float>::infinity() : args.maxima[k] * kLn2;
  }
}

// ---- row sums, and the next round's column sums: a block of rows, all columns ----

// exp2(scale x + log2(e) columns + shift) over a row: the sum. Stored in `exponentials` unless that is null, in the
// order of load_two but for the last columns, less than 2W, which are in their own.
template <Element E, int W>
DINOV3_EXT_INLINE float row_sum(const SinkhornLogits& logits, const void* row, const float* columns, float shift,
                                float* exponentials) {
  using Float = typename Vector<W>::Float;
  const int64_t whole = logits.prototypes / (2 * W) * (2 * W);
  float total = 0;
  for (int64_t first = 0; first < whole; first += kColumnsAtOnce) {
    const int64_t last = std::min(first + kColumnsAtOnce, whole);
    Float sum = splat<W>(0.f);
    for (int64_t k = first; k < last; k += 2 * W) {
      const Two<W> x = load_two<E, W>(row, k), c = load_two_of<E, W>(columns + k);
      prefetch_two<E, W>(row, k + kColumnsAtOnce);
      const Float a = exp2_flushed<W>(exponent<W>(logits.scale, x.first, kLog2E, c.first, shift));
      const Float b = exp2_flushed<W>(exponent<W>(logits.scale, x.second, kLog2E, c.second, shift));
      if (exponentials) store<W>(exponentials + k, a), store<W>(exponentials + k + W, b);
      sum += a + b;
    }
    total += sum_lanes<W>(sum);
  }
  for (int64_t k = whole; k < logits.prototypes; k += W) {
    const int64_t rest = std::min<int64_t>(W, logits.prototypes - k);
    const Float x = load_element_tail<E, W>(row, k, rest);
    const Float e = exp2_flushed<W>(exponent<W>(logits.scale, x, kLog2E, load_tail<W>(columns + k, rest), shift));
    const Float kept = keep_first<W>(e, rest, splat<W>(0.f));
    if (exponentials) store_tail<W>(exponentials + k, kept, rest);
    total += sum_lanes<W>(kept);
  }
  return total;
}

template <Element E, int W>
DINOV3_EXT_INLINE float row_maximum(const SinkhornLogits& logits, const void* row, const float* columns) {
  using Float = typename Vector<W>::Float;
  const float infinity = std::numeric_limits<float>::infinity();
  Float maximum = splat<W>(-infinity);
  for (int64_t k = 0; k < logits.prototypes; k += W) {
    const int64_t rest = std::min<int64_t>(W, logits.prototypes - k);
    const Float x = rest == W ? load_element<E, W>(row, k) : load_element_tail<E, W>(row, k, rest);
    const Float c = rest == W ? load<W>(columns + k) : load_tail<W>(columns + k, rest);
    const Float e = exponent<W>(logits.scale, x, kLog2E, c, 0.f);
    maximum = larger<W>(maximum, rest == W ? e : keep_first<W>(e, rest, splat<W>(-infinity)));
  }
  float highest = -infinity;
  for (int lane = 0; lane < W; ++lane) highest = maximum[lane] > highest ? maximum[lane] : highest;
  return highest;
}

// The sum of exp2(scale x + log2(e) columns + shift) over one row, and the shift with which it is a normal number.
template <Element E, int W>
DINOV3_EXT_INLINE float whole_row_sum(const SinkhornLogits& logits, int64_t row, const float* columns, float& shift,
                                      float* exponentials) {
  const void* x = row_of(logits, row);
  const float sum = row_sum<E, W>(logits, x, columns, shift, exponentials);
  if (sum >= kSmallest && sum <= kLargest) return sum;
  const float maximum = row_maximum<E, W>(logits, x, columns);
  shift = maximum > -std::numeric_limits<float>::infinity() ? -maximum : 0.f;
  return row_sum<E, W>(logits, x, columns, shift, exponentials);
}

// sums (+)= the sum over `Rows` rows of factors[i] exponentials[i].
template <int W, int Rows>
DINOV3_EXT_INLINE void add_scaled(float* sums, const float* exponentials, int64_t pitch, const float* factors,
                                  int64_t count, bool add) {
  const int64_t whole = count / W * W;
  for (int64_t k = 0; k < whole; k += W) {
    auto sum = add ? load<W>(sums + k) : splat<W>(0.f);
    for (int i = 0; i < Rows; ++i) sum += load<W>(exponentials + i * pitch + k) * factors[i];
    store<W>(sums + k, sum);
  }
  for (int64_t k = whole; k < count; ++k) {
    float sum = add ? sums[k] : 0.f;
    for (int i = 0; i < Rows; ++i) sum += exponentials[i * pitch + k] * factors[i];
    sums[k] = sum;
  }
}

int64_t pitch_of(int64_t prototypes) { return divide_up(prototypes, 16) * 16 + 16; }
int64_t rows_kept(int64_t prototypes) {
  return pitch_of(prototypes) * kRowsKept <= kExponentialsKept + 256 ? kRowsKept : 1;
}

// Rows [begin, end): their potentials, and their share of the column sums into `partial` (prototypes,) unless null, in
// the order of row_sum. `exponentials`: space for rows_kept rows.
template <Element E, int W>
DINOV3_EXT_INLINE void row_block(const SinkhornRowSums& args, int64_t begin, int64_t end, float* partial,
                                 float* exponentials) {
  const SinkhornLogits& logits = args.logits;
  const int64_t pitch = pitch_of(logits.prototypes), group = rows_kept(logits.prototypes);
  float factors[kRowsKept];
  for (int64_t first = begin; first < end; first += group) {
    const int64_t rows = std::min(group, end - first);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = first + i;
      float* kept = partial ? exponentials + i * pitch : nullptr;
      float shift = args.previous[row] * kLog2E;
      const float sum = whole_row_sum<E, W>(logits, row, args.columns, shift, kept);
      args.rows[row] = shift * kLn2 - std::log(sum);
      factors[i] = 1.f / sum;
    }
    if (!partial) continue;
    if (rows == kRowsKept) {
      add_scaled<W, kRowsKept>(partial, exponentials, pitch, factors, logits.prototypes, first > begin);
      continue;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const bool add = first + i > begin;
      add_scaled<W, 1>(partial, exponentials + i * pitch, pitch, factors + i, logits.prototypes, add);
    }
  }
}

// Columns [begin, end) of the sums, from the partial ones in the order of row_sum; `begin` is a multiple of 2W.
template <Element E, int W>
DINOV3_EXT_INLINE void join(const SinkhornRowSums& args, int64_t splits, int64_t begin, int64_t end) {
  const int64_t prototypes = args.logits.prototypes;
  const int64_t whole = std::min(end, prototypes / (2 * W) * (2 * W));
  for (int64_t k = begin; k < whole; k += 2 * W) {
    Two<W> sum{splat<W>(0.f), splat<W>(0.f)};
    for (int64_t split = 0; split < splits; ++split) {
      const float* partial = args.partial + split * prototypes + k;
      sum.first += load<W>(partial), sum.second += load<W>(partial + W);
    }
    store_two_of<E, W>(args.sums + k, sum);
  }
  for (int64_t k = std::max(begin, whole); k < end; ++k) {
    float sum = 0;
    for (int64_t split = 0; split < splits; ++split) sum += args.partial[split * prototypes + k];
    args.sums[k] = sum;
  }
}

// ---- one rank alone: a tile of columns, all rows; the columns' potentials and their share of the row sums ----

constexpr int64_t kTileExponentials = 1 << 17;  // 512 KB
constexpr int64_t kRowsTogether = 4;            // that share the loads of the columns' numbers

// Columns of a tile: a multiple of every 2W.
int64_t columns_of_iteration(const SinkhornLogits& logits) {
  const int64_t by_cache = kTileExponentials / std::max<int64_t>(1, logits.rows) / 64 * 64;
  const int64_t by_tasks = divide_up(logits.prototypes, 16 * 64) * 64;
  return std::clamp<int64_t>(std::min(by_cache, by_tasks), 64, 4096);
}

template <Element E, int W>
DINOV3_EXT_INLINE Two<W> load_two_of_row(const void* row, int64_t k, int64_t count) {
  return count >= 2 * W ? load_two<E, W>(row, k) : load_two_tail<E, W>(row, k, count);
}

// maxima[k] (in units of log2, in the order of load_two) of the columns [begin, begin + count).
template <Element E, int W>
DINOV3_EXT_INLINE void tile_maxima(const SinkhornLogits& logits, int64_t begin, int64_t count, float* maxima) {
  for (int64_t k = 0; k < count; k += 2 * W) {
    store<W>(maxima + k, splat<W>(-std::numeric_limits<float>::infinity()));
    store<W>(maxima + k + W, splat<W>(-std::numeric_limits<float>::infinity()));
  }
  for (int64_t b = 0; b < logits.rows; b += kRowsTogether) {
    const int64_t rows = std::min(kRowsTogether, logits.rows - b);
    for (int64_t k = 0; k < count; k += 2 * W) {
      auto first = load<W>(maxima + k), second = load<W>(maxima + k + W);
      for (int64_t i = 0; i < rows; ++i) {
        const Two<W> x = load_two_of_row<E, W>(row_of(logits, b + i), begin + k, count - k);
        if (b + i + kRowsTogether < logits.rows) {
          prefetch_two<E, W>(row_of(logits, b + i + kRowsTogether), begin + k);
        }
        first = larger<W>(first, x.first * logits.scale), second = larger<W>(second, x.second * logits.scale);
      }
      store<W>(maxima + k, first), store<W>(maxima + k + W, second);
    }
  }
}

// exponentials (Rows, pitch) = exp2(scale x + log2(e) columns + log2(e) rows), and their sums over all rows so far.
template <Element E, int W, int Rows>
DINOV3_EXT_INLINE void tile_exponentials(const SinkhornLogits& logits, int64_t row, int64_t begin, int64_t count,
                                         const float* shifts, const float* columns, float* sums, float* exponentials,
                                         int64_t pitch) {
  const bool more = row + 2 * Rows <= logits.rows;
  for (int64_t k = 0; k < count; k += 2 * W) {
    const auto c = load<W>(columns + k), d = load<W>(columns + k + W);
    auto first = load<W>(sums + k), second = load<W>(sums + k + W);
    for (int i = 0; i < Rows; ++i) {
      const Two<W> x = load_two_of_row<E, W>(row_of(logits, row + i), begin + k, count - k);
      if (more) prefetch_two<E, W>(row_of(logits, row + Rows + i), begin + k);
      const auto a = exp2_flushed<W>(exponent<W>(logits.scale, x.first, kLog2E, c, shifts[i]));
      const auto b = exp2_flushed<W>(exponent<W>(logits.scale, x.second, kLog2E, d, shifts[i]));
      store<W>(exponentials + i * pitch + k, a), store<W>(exponentials + i * pitch + k + W, b);
      first += a, second += b;
    }
    store<W>(sums + k, first), store<W>(sums + k + W, second);
  }
}

// shares[i] = sum over k of exponentials[i][k] factors[k].
template <int W, int Rows>
DINOV3_EXT_INLINE void tile_shares(const float* exponentials, int64_t pitch, const float* factors, int64_t count,
                                   float* shares) {
  typename Vector<W>::Float sum[Rows];
  for (int i = 0; i < Rows; ++i) sum[i] = splat<W>(0.f);
  for (int64_t k = 0; k < count; k += W) {
    const auto factor = load<W>(factors + k);
    for (int i = 0; i < Rows; ++i) sum[i] += load<W>(exponentials + i * pitch + k) * factor;
  }
  for (int i = 0; i < Rows; ++i) shares[i] = sum_lanes<W>(sum[i]);
}

// Columns [begin, end): their potentials, and their shares of the rows' sums to `shares` (rows,). `space`: three floats
// for each column of a tile, then the exponentials.
template <Element E, int W>
DINOV3_EXT_INLINE void iteration_tile(const SinkhornIteration& args, int64_t begin, int64_t end, float* shares,
                                      float* space) {
  const SinkhornLogits& logits = args.logits;
  const float infinity = std::numeric_limits<float>::infinity();
  const int64_t count = end - begin, pitch = divide_up(count, 2 * W) * (2 * W);
  float *columns = space, *sums = columns + pitch, *ordered = sums + pitch, *exponentials = ordered + pitch;
  float* potentials = args.columns + begin;  // in their own order
  // Behind the last column: -inf, whose exponentials add nothing.
  if (args.first) {
    tile_maxima<E, W>(logits, begin, count, sums);
    for (int64_t k = 0; k < pitch; k += 2 * W) {
      const Two<W> maximum{load<W>(sums + k), load<W>(sums + k + W)};
      const auto lowest = splat<W>(-infinity), zero = splat<W>(0.f);  // -inf - -inf would be NaN
      store_two_of<E, W>(ordered + k, {maximum.first == lowest ? zero : maximum.first * -kLn2,
                                       maximum.second == lowest ? zero : maximum.second * -kLn2});
    }
  } else {
    std::copy(potentials, potentials + count, ordered);
  }
  std::fill(ordered + count, ordered + pitch, -infinity);
  for (int64_t k = 0; k < pitch; k += 2 * W) {
    const Two<W> two = load_two_of<E, W>(ordered + k);
    store<W>(columns + k, two.first), store<W>(columns + k + W, two.second);
  }
  std::fill(sums, sums + pitch, 0.f);
  for (int64_t b = 0; b < logits.rows; b += kRowsTogether) {
    const int64_t rows = std::min(kRowsTogether, logits.rows - b);
    float shifts[kRowsTogether];
    for (int64_t i = 0; i < rows; ++i) shifts[i] = args.first ? 0.f : args.rows[b + i] * kLog2E;
    float* to = exponentials + b * pitch;
    if (rows == kRowsTogether) {
      tile_exponentials<E, W, kRowsTogether>(logits, b, begin, count, shifts, columns, sums, to, pitch);
      continue;
    }
    for (int64_t i = 0; i < rows; ++i) {
      tile_exponentials<E, W, 1>(logits, b + i, begin, count, shifts + i, columns, sums, to + i * pitch, pitch);
    }
  }
  // The finished columns, and what takes the exponentials there.
  for (int64_t k = 0; k < pitch; k += 2 * W) {
    const auto zero = splat<W>(0.f), one = splat<W>(1.f);
    const Two<W> sum{load<W>(sums + k), load<W>(sums + k + W)}, old{load<W>(columns + k), load<W>(columns + k + W)};
    store<W>(sums + k, sum.first == zero ? zero : one / sum.first);
    store<W>(sums + k + W, sum.second == zero ? zero : one / sum.second);
    store_two_of<E, W>(ordered + k, {sum.first == zero ? zero : old.first - logarithm<W>(sum.first),
                                     sum.second == zero ? zero : old.second - logarithm<W>(sum.second)});
  }
  std::copy(ordered, ordered + count, potentials);
  for (int64_t b = 0; b < logits.rows; b += kRowsTogether) {
    const float* from = exponentials + b * pitch;
    const int64_t rows = std::min(kRowsTogether, logits.rows - b);
    if (rows == kRowsTogether) {
      tile_shares<W, kRowsTogether>(from, pitch, sums, pitch, shares + b);
      continue;
    }
    for (int64_t i = 0; i < rows; ++i) tile_shares<W, 1>(from + i * pitch, pitch, sums, pitch, shares + b + i);
  }
}

// Rows [begin, end): the potentials from all tiles' shares; anew, where the potential before was no good guess.
template <Element E, int W>
DINOV3_EXT_INLINE void iteration_rows(const SinkhornIteration& args, int64_t tiles, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float shift = args.first ? 0.f : args.rows[row] * kLog2E, sum = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += args.partial[tile * args.logits.rows + row];
    if (!(sum >= kSmallest && sum <= kLargest)) {
      sum = whole_row_sum<E, W>(args.logits, row, args.columns, shift, nullptr);
    }
    args.rows[row] = shift * kLn2 - std::log(sum);
  }
}

// ---- one set of functions per instruction set ----

struct Kernels {
  void (*column_tile)(const SinkhornColumnSums&, int64_t begin, int64_t end);
  void (*row_block)(const SinkhornRowSums&, int64_t begin, int64_t end, float* partial, float* exponentials);
  void (*join)(const SinkhornRowSums&, int64_t splits, int64_t begin, int64_t end);
  void (*iteration_tile)(const SinkhornIteration&, int64_t begin, int64_t end, float* shares, float* space);
  void (*iteration_rows)(const SinkhornIteration&, int64_t tiles, int64_t begin, int64_t end);
};

#define KERNELS_OF(TARGET, NAME, W)                                                                             \
  template <Element E>                                                                                          \
  TARGET void column_tile_##NAME(const SinkhornColumnSums& args, int64_t begin, int64_t end) {                  \
    column_tile<E, W>(args, begin, end);                                                                        \
  }                                                                                                             \
  template <Element E>                                                                                          \
  TARGET void row_block_##NAME(const SinkhornRowSums& args, int64_t begin, int64_t end, float* partial,         \
                               float* exponentials) {                                                           \
    row_block<E, W>(args, begin, end, partial, exponentials);                                                   \
  }                                                                                                             \
  template <Element E>                                                                                          \
  TARGET void join_##NAME(const SinkhornRowSums& args, int64_t splits, int64_t begin, int64_t end) {            \
    join<E, W>(args, splits, begin, end);                                                                       \
  }                                                                                                             \
  template <Element E>                                                                                          \
  TARGET void iteration_tile_##NAME(const SinkhornIteration& args, int64_t begin, int64_t end, float* shares,   \
                                    float* space) {                                                             \
    iteration_tile<E, W>(args, begin, end, shares, space);                                                      \
  }                                                                                                             \
  template <Element E>                                                                                          \
  TARGET void iteration_rows_##NAME(const SinkhornIteration& args, int64_t tiles, int64_t begin, int64_t end) { \
    iteration_rows<E, W>(args, tiles, begin, end);                                                              \
  }                                                                                                             \
  template <Element E>                                                                                          \
  constexpr Kernels kernels_##NAME{column_tile_##NAME<E>, row_block_##NAME<E>, join_##NAME<E>,                  \
                                   iteration_tile_##NAME<E>, iteration_rows_##NAME<E>};

KERNELS_OF(, portable, 4)
#if defined(__x86_64__)
KERNELS_OF(DINOV3_EXT_AVX2, avx2, 8)
KERNELS_OF(DINOV3_EXT_AVX512, avx512, 16)
#endif

const Kernels& kernels_of(Element element) {
  return with_element(element, []<Element E>() -> const Kernels& {
#if defined(__x86_64__)
    return choose_by_variant(kernels_portable<E>, kernels_avx2<E>, kernels_avx512<E>);
#else
    return kernels_portable<E>;
#endif
  });
}

// Rows of one split: sixteen splits at most, and few in small problems, for each has column sums of its own. Making the
// exponentials twice instead needs no such workspace but lost: 5.3 against 4.4 ms (128 x 65536 bf16, one AVX-512 core).
int64_t rows_of_split(int64_t rows) { return std::max<int64_t>(16, divide_up(rows, 16)); }

// Columns of one task: a sixteenth of a row, 256 to 4096.
int64_t columns_of_tile(int64_t prototypes) {
  return std::clamp<int64_t>(divide_up(prototypes, 16 * 64) * 64, 256, 4096);
}

}  // namespace

int64_t sinkhorn_shares_cpu(const SinkhornLogits& logits) {
  return logits.rows * divide_up(logits.prototypes, columns_of_iteration(logits));
}

void sinkhorn_iteration_cpu(const SinkhornIteration& args, ParallelFor parallel_for) {
  struct Task {
    const SinkhornIteration& args;
    const Kernels& kernels;
    int64_t columns, tiles;
  } task{args, kernels_of(args.logits.element), columns_of_iteration(args.logits), 0};
  task.tiles = divide_up(args.logits.prototypes, task.columns);
  parallel_for(
      0, task.tiles,
      [](int64_t begin, int64_t end, void* context) {
        const Task& task = *static_cast<const Task*>(context);
        const SinkhornLogits& logits = task.args.logits;
        const FlushDenormals flush;
        const auto space = std::make_unique_for_overwrite<float[]>((logits.rows + 3) * task.columns);
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t first = tile * task.columns, last = std::min(first + task.columns, logits.prototypes);
          task.kernels.iteration_tile(task.args, first, last, task.args.partial + tile * logits.rows, space.get());
        }
      },
      &task);
  parallel_for(
      0, divide_up(args.logits.rows, 64),
      [](int64_t begin, int64_t end, void* context) {
        const Task& task = *static_cast<const Task*>(context);
        const FlushDenormals flush;
        task.kernels.iteration_rows(task.args, task.tiles, begin * 64, std::min(end * 64, task.args.logits.rows));
      },
      &task);
}

int64_t sinkhorn_splits_cpu(int64_t rows) { return divide_up(rows, rows_of_split(rows)); }

void sinkhorn_column_sums_cpu(const SinkhornColumnSums& args, ParallelFor parallel_for) {
  struct Task {
    const SinkhornColumnSums& args;
    const Kernels& kernels;
    int64_t columns;
  } task{args, kernels_of(args.logits.element), columns_of_tile(args.logits.prototypes)};
  parallel_for(
      0, divide_up(args.logits.prototypes, task.columns),
      [](int64_t begin, int64_t end, void* context) {
        const Task& task = *static_cast<const Task*>(context);
        const FlushDenormals flush;
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t first = tile * task.columns;
          task.kernels.column_tile(task.args, first, std::min(first + task.columns, task.args.logits.prototypes));
        }
      },
      &task);
}

void sinkhorn_finish_cpu(const SinkhornFinish& args, ParallelFor parallel_for) {
  parallel_for(
      0, divide_up(args.prototypes, 4096),
      [](int64_t begin, int64_t end, void* context) {
        const SinkhornFinish& args = *static_cast<const SinkhornFinish*>(context);
        for (int64_t k = begin * 4096; k < std::min(end * 4096, args.prototypes); ++k) {
          args.columns[k] = args.sums[k] == 0 ? 0.f : args.shift[k] - std::log(args.sums[k]);
        }
      },
      const_cast<SinkhornFinish*>(&args));
}

void sinkhorn_row_sums_cpu(const SinkhornRowSums& args, ParallelFor parallel_for) {
  struct Task {
    const SinkhornRowSums& args;
    const Kernels& kernels;
    int64_t rows, splits;
  } task{args, kernels_of(args.logits.element), rows_of_split(args.logits.rows), sinkhorn_splits_cpu(args.logits.rows)};
  parallel_for(
      0, task.splits,
      [](int64_t begin, int64_t end, void* context) {
        const Task& task = *static_cast<const Task*>(context);
        const int64_t prototypes = task.args.logits.prototypes;
        const FlushDenormals flush;
        const int64_t kept = task.args.partial ? rows_kept(prototypes) * pitch_of(prototypes) : 0;
        const auto exponentials = std::make_unique_for_overwrite<float[]>(kept);
        for (int64_t split = begin; split < end; ++split) {
          float* partial = task.args.partial ? task.args.partial + split * prototypes : nullptr;
          task.kernels.row_block(task.args, split * task.rows, std::min((split + 1) * task.rows, task.args.logits.rows),
                                 partial, partial ? exponentials.get() : nullptr);
        }
      },
      &task);
  if (!args.partial) return;
  parallel_for(
      0, divide_up(args.logits.prototypes, 4096),
      [](int64_t begin, int64_t end, void* context) {
        const Task& task = *static_cast<const Task*>(context);
        task.kernels.join(task.args, task.splits, begin * 4096, std::min(end * 4096, task.args.logits.prototypes));
      },
      &task);
}

}  // namespace dinov3_ext
