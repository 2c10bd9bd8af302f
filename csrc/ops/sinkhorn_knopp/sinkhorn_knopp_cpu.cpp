// Sinkhorn-Knopp on the CPU. Each round reads the logits once: a row's exponentials stay in the cache between its sum
// and its share of the column sums. Work is cut by shape, never by the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "core/cpu_variant.h"
#include "core/cpu_vector.h"
#include "ops/sinkhorn_knopp/sinkhorn_knopp.h"

namespace dinov3_ext {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int64_t kRowsAtOnce = 8;        // rows between two corrections of the running column maximum
constexpr int64_t kColumnsAtOnce = 1024;  // columns whose partial sum is taken before it joins the row's sum
constexpr float kSmallest = 0x1p-60f, kLargest = 0x1p60f;  // row sums outside: the guess of the shift was not good

int64_t bytes(Element element) { return element == Element::float32 ? 4 : 2; }

const void* row_of(const SinkhornLogits& logits, int64_t row) {
  return static_cast<const char*>(logits.data) + row * logits.row_stride * bytes(logits.element);
}

// ---- column sums: a tile of columns, all rows ----------------------------------------------------------------------

// Adds up to kRowsAtOnce rows to the running maximum (in units of log2) and sum of one vector of columns.
template <Element E, int W>
DINOV3_EXT_INLINE void column_step(const SinkhornColumnSums& args, int64_t first, int64_t rows, int64_t column,
                                   int64_t count) {
  using Float = typename Vector<W>::Float;
  const Float lowest = splat<W>(-std::numeric_limits<float>::infinity()), zero = splat<W>(0.f);
  const bool start = first == 0, whole = count == W;
  Float before = lowest, sum = zero;
  if (!start) before = whole ? load<W>(args.maxima + column) : load_tail<W>(args.maxima + column, count);
  if (!start) sum = whole ? load<W>(args.sums + column) : load_tail<W>(args.sums + column, count);
  Float x[kRowsAtOnce], maximum = before;
  for (int64_t i = 0; i < rows; ++i) {
    const void* row = row_of(args.logits, first + i);
    x[i] = whole ? load_element<E, W>(row, column) : load_element_tail<E, W>(row, column, count);
    x[i] *= args.logits.scale;
    maximum = larger<W>(maximum, x[i]);
  }
  const Float shift = maximum == lowest ? zero : maximum;  // -inf - -inf would be NaN
  Float added = zero;
  for (int64_t i = 0; i < rows; ++i) added += exp2<W>(x[i] - shift);
  store_tail<W>(args.maxima + column, maximum, count);
  store_tail<W>(args.sums + column, sum * exp2<W>(before - shift) + added, count);
}

// A tile of columns: all rows, a few at a time, so that each row is read in long runs.
template <Element E, int W>
DINOV3_EXT_INLINE void column_tile(const SinkhornColumnSums& args, int64_t begin, int64_t end) {
  const int64_t whole = begin + (end - begin) / W * W;
  for (int64_t first = 0; first < args.logits.rows; first += kRowsAtOnce) {
    if (const int64_t rows = args.logits.rows - first; rows >= kRowsAtOnce) {
      for (int64_t k = begin; k < whole; k += W) column_step<E, W>(args, first, kRowsAtOnce, k, W);
      if (whole < end) column_step<E, W>(args, first, kRowsAtOnce, whole, end - whole);
    } else {
      for (int64_t k = begin; k < whole; k += W) column_step<E, W>(args, first, rows, k, W);
      if (whole < end) column_step<E, W>(args, first, rows, whole, end - whole);
    }
  }
  for (int64_t k = begin; k < end; ++k) {
    if (args.logits.rows == 0) args.sums[k] = 0;
    args.maxima[k] = args.logits.rows == 0 ? -std::numeric_limits<float>::infinity() : args.maxima[k] * kLn2;
  }
}

// ---- row sums, and the next round's column sums: a block of rows, all columns ---------------------------------------

// exp2(scale x + log2(e) columns + shift) over a row: the sum; stored in `exponentials` unless that is null.
template <Element E, int W>
DINOV3_EXT_INLINE float row_sum(const SinkhornLogits& logits, const void* row, const float* columns, float shift,
                                float* exponentials) {
  using Float = typename Vector<W>::Float;
  const int64_t whole = logits.prototypes / W * W;
  float total = 0;
  for (int64_t first = 0; first < whole; first += kColumnsAtOnce) {
    const int64_t last = std::min(first + kColumnsAtOnce, whole);
    Float sum = splat<W>(0.f);
    for (int64_t k = first; k < last; k += W) {
      const Float e = exp2<W>(load_element<E, W>(row, k) * logits.scale + (load<W>(columns + k) * kLog2E + shift));
      if (exponentials) store<W>(exponentials + k, e);
      sum += e;
    }
    total += sum_lanes<W>(sum);
  }
  if (const int64_t rest = logits.prototypes - whole) {
    const Float x = load_element_tail<E, W>(row, whole, rest) * logits.scale;
    const Float e =
        keep_first<W>(exp2<W>(x + (load_tail<W>(columns + whole, rest) * kLog2E + shift)), rest, splat<W>(0.f));
    if (exponentials) store_tail<W>(exponentials + whole, e, rest);
    total += sum_lanes<W>(e);
  }
  return total;
}

template <Element E, int W>
DINOV3_EXT_INLINE float row_maximum(const SinkhornLogits& logits, const void* row, const float* columns) {
  using Float = typename Vector<W>::Float;
  const float infinity = std::numeric_limits<float>::infinity();
  const int64_t whole = logits.prototypes / W * W;
  Float maximum = splat<W>(-infinity);
  for (int64_t k = 0; k < whole; k += W) {
    maximum = larger<W>(maximum, load_element<E, W>(row, k) * logits.scale + load<W>(columns + k) * kLog2E);
  }
  if (const int64_t rest = logits.prototypes - whole) {
    const Float x =
        load_element_tail<E, W>(row, whole, rest) * logits.scale + load_tail<W>(columns + whole, rest) * kLog2E;
    maximum = larger<W>(maximum, keep_first<W>(x, rest, splat<W>(-infinity)));
  }
  float highest = -infinity;
  for (int lane = 0; lane < W; ++lane) highest = maximum[lane] > highest ? maximum[lane] : highest;
  return highest;
}

template <int W>
DINOV3_EXT_INLINE void add_scaled(float* sums, const float* exponentials, float factor, int64_t count, bool first) {
  const int64_t whole = count / W * W;
  for (int64_t k = 0; k < whole; k += W) {
    const auto before = first ? splat<W>(0.f) : load<W>(sums + k);
    store<W>(sums + k, load<W>(exponentials + k) * factor + before);
  }
  for (int64_t k = whole; k < count; ++k) sums[k] = exponentials[k] * factor + (first ? 0.f : sums[k]);
}

// Rows [begin, end): their potentials, and their share of the column sums into `partial` (prototypes,) unless null.
template <Element E, int W>
DINOV3_EXT_INLINE void row_block(const SinkhornRowSums& args, int64_t begin, int64_t end, float* partial,
                                 float* exponentials) {
  const SinkhornLogits& logits = args.logits;
  for (int64_t row = begin; row < end; ++row) {
    const void* x = row_of(logits, row);
    float shift = args.previous[row] * kLog2E;
    float sum = row_sum<E, W>(logits, x, args.columns, shift, exponentials);
    if (!(sum >= kSmallest && sum <= kLargest)) {
      const float maximum = row_maximum<E, W>(logits, x, args.columns);
      shift = maximum > -std::numeric_limits<float>::infinity() ? -maximum : 0.f;
      sum = row_sum<E, W>(logits, x, args.columns, shift, exponentials);
    }
    args.rows[row] = shift * kLn2 - std::log(sum);
    if (partial) add_scaled<W>(partial, exponentials, 1.f / sum, logits.prototypes, row == begin);
  }
}

// ---- one function per instruction set -------------------------------------------------------------------------------

template <int W>
DINOV3_EXT_INLINE void column_tile_of_any(const SinkhornColumnSums& args, int64_t begin, int64_t end) {
  switch (args.logits.element) {
    case Element::float32: return column_tile<Element::float32, W>(args, begin, end);
    case Element::bfloat16: return column_tile<Element::bfloat16, W>(args, begin, end);
    case Element::float16: return column_tile<Element::float16, W>(args, begin, end);
  }
}

template <int W>
DINOV3_EXT_INLINE void row_block_of_any(const SinkhornRowSums& args, int64_t begin, int64_t end, float* partial,
                                        float* exponentials) {
  switch (args.logits.element) {
    case Element::float32: return row_block<Element::float32, W>(args, begin, end, partial, exponentials);
    case Element::bfloat16: return row_block<Element::bfloat16, W>(args, begin, end, partial, exponentials);
    case Element::float16: return row_block<Element::float16, W>(args, begin, end, partial, exponentials);
  }
}

using ColumnTile = void (*)(const SinkhornColumnSums&, int64_t, int64_t);
using RowBlock = void (*)(const SinkhornRowSums&, int64_t, int64_t, float*, float*);

void column_tile_portable(const SinkhornColumnSums& args, int64_t begin, int64_t end) {
  column_tile_of_any<4>(args, begin, end);
}
void row_block_portable(const SinkhornRowSums& args, int64_t begin, int64_t end, float* partial, float* exponentials) {
  row_block_of_any<4>(args, begin, end, partial, exponentials);
}
#if defined(__x86_64__)
DINOV3_EXT_AVX2 void column_tile_avx2(const SinkhornColumnSums& args, int64_t begin, int64_t end) {
  column_tile_of_any<8>(args, begin, end);
}
DINOV3_EXT_AVX2 void row_block_avx2(const SinkhornRowSums& args, int64_t begin, int64_t end, float* partial,
                                    float* exponentials) {
  row_block_of_any<8>(args, begin, end, partial, exponentials);
}
DINOV3_EXT_AVX512 void column_tile_avx512(const SinkhornColumnSums& args, int64_t begin, int64_t end) {
  column_tile_of_any<16>(args, begin, end);
}
DINOV3_EXT_AVX512 void row_block_avx512(const SinkhornRowSums& args, int64_t begin, int64_t end, float* partial,
                                        float* exponentials) {
  row_block_of_any<16>(args, begin, end, partial, exponentials);
}
#endif

ColumnTile column_tile_here() {
#if defined(__x86_64__)
  if (cpu_variant() >= CpuVariant::avx512) return column_tile_avx512;
  if (cpu_variant() >= CpuVariant::avx2) return column_tile_avx2;
#endif
  return column_tile_portable;
}

RowBlock row_block_here() {
#if defined(__x86_64__)
  if (cpu_variant() >= CpuVariant::avx512) return row_block_avx512;
  if (cpu_variant() >= CpuVariant::avx2) return row_block_avx2;
#endif
  return row_block_portable;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of one split: sixteen splits at most, and few in small problems, for each has column sums of its own. Making the
// exponentials twice instead needs no such workspace but lost: 5.3 against 4.4 ms (128 x 65536 bf16, one AVX-512 core).
int64_t rows_of_split(int64_t rows) { return std::max<int64_t>(16, divide_up(rows, 16)); }

// Columns of one task: a sixteenth of a row, 256 to 4096.
int64_t columns_of_tile(int64_t prototypes) {
  return std::clamp<int64_t>(divide_up(prototypes, 16 * 64) * 64, 256, 4096);
}

}  // namespace

int64_t sinkhorn_splits_cpu(int64_t rows) { return divide_up(rows, rows_of_split(rows)); }

void sinkhorn_column_sums_cpu(const SinkhornColumnSums& args, ParallelFor parallel_for) {
  struct Task {
    const SinkhornColumnSums& args;
    ColumnTile tile;
    int64_t columns;
  } task{args, column_tile_here(), columns_of_tile(args.logits.prototypes)};
  parallel_for(
      0, divide_up(args.logits.prototypes, task.columns),
      [](int64_t begin, int64_t end, void* context) {
        const Task& task = *static_cast<const Task*>(context);
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t first = tile * task.columns;
          task.tile(task.args, first, std::min(first + task.columns, task.args.logits.prototypes));
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
    RowBlock block;
    int64_t rows, splits;
  } task{args, row_block_here(), rows_of_split(args.logits.rows), sinkhorn_splits_cpu(args.logits.rows)};
  parallel_for(
      0, task.splits,
      [](int64_t begin, int64_t end, void* context) {
        const Task& task = *static_cast<const Task*>(context);
        const int64_t prototypes = task.args.logits.prototypes;
        const auto exponentials = std::make_unique_for_overwrite<float[]>(task.args.partial ? prototypes : 0);
        for (int64_t split = begin; split < end; ++split) {
          float* partial = task.args.partial ? task.args.partial + split * prototypes : nullptr;
          task.block(task.args, split * task.rows, std::min((split + 1) * task.rows, task.args.logits.rows), partial,
                     partial ? exponentials.get() : nullptr);
        }
      },
      &task);
  if (!args.partial) return;
  parallel_for(
      0, divide_up(args.logits.prototypes, 4096),
      [](int64_t begin, int64_t end, void* context) {
        const Task& task = *static_cast<const Task*>(context);
        const int64_t prototypes = task.args.logits.prototypes;
        const int64_t first = begin * 4096, last = std::min(end * 4096, prototypes);
        std::fill(task.args.sums + first, task.args.sums + last, 0.f);
        for (int64_t split = 0; split < task.splits; ++split) {
          const float* partial = task.args.partial + split * prototypes;
          for (int64_t k = first; k < last; ++k) task.args.sums[k] += partial[k];
        }
      },
      &task);
}

}  // namespace dinov3_ext
