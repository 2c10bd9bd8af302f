// Gram anchoring on the CPU: 4 N N D products where PyTorch makes 8, and no matrix of similarities. Products are fp32
// here, or of bf16 parts on AMX tiles (gram_loss_cpu_parts.cpp).
//
// Per strip of rows (gram_loss_plan_cpu.h):
//   1. a task per image and one or a few columns J of blocks: similarities of student and teacher (symmetric: rows
//      I <= J), the loss, the differences d', and what the normalisation takes back, t[i] = sum_j d'[i, j] S[i, j]
//   2. a task per image, 64 columns of the width and group of rows: d' times the normalised features. Rows of the strip
//      become the gradient; rows below it collect the strip's share: in the gradient's own memory, and where that is
//      bf16, with the low halves of the fp32 numbers beside it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/cpu_tile.h"
#include "ops/gram_loss/gram_loss_cpu.h"

namespace dinov3_ext {
namespace {

using namespace gram;

constexpr int64_t kDepth = 128;        // of the width, packed at a time for similarities
constexpr int64_t kSummed = 32;        // products summed before they join the sum
constexpr int64_t kNarrow = 32;        // widths up to here: fp64, the few rounding errors do not average out
constexpr int64_t kChunkColumns = 64;  // of the width, in a task of the gradient
constexpr int64_t kGroupBlocks = 3;    // of patches, in a task of the gradient
constexpr double kLongest = 1 / double(kGramSmallestNorm);

// 1 / max(norm, 1e-12) of a row. In fp64: no error common to the row, no square out of range.
template <int W>
DINOV3_EXT_INLINE double inverse_norm(const GramFeatures& features, int64_t image, int64_t row, int64_t width) {
  float part[kDepth];
  double sums[16] = {}, total = 0;
  for (int64_t k = 0; k < width; k += kDepth) {
    const int64_t count = std::min(kDepth, width - k);
    read_row<W>(features, image, row, k, count, 1., part);
    std::fill(part + count, part + GramPlan::divide_up(count, 16) * 16, 0.f);
    for (int64_t i = 0; i < count; i += 16) {
      for (int lane = 0; lane < 16; ++lane) sums[lane] += double(part[i + lane]) * part[i + lane];
    }
  }
  for (const double sum : sums) total += sum;
  return 1 / std::max(std::sqrt(total), double(kGramSmallestNorm));
}

// Normalised features of rows [row, row + kTileRows) as (rows, kDepth); zeros below the last patch.
template <int W>
DINOV3_EXT_INLINE void pack_rows(const GramFeatures& features, const double* inverse, int64_t image, int64_t row,
                                 int64_t rows, int64_t patches, int64_t begin, int64_t count, float* to) {
  for (int64_t m = 0; m < rows; ++m) {
    if (row + m < patches) {
      read_row<W>(features, image, row + m, begin, count, inverse[row + m], to + m * kDepth);
    } else {
      std::fill(to + m * kDepth, to + m * kDepth + count, 0.f);
    }
  }
}

// The same of a block's rows, turned: panels of kTileColumns rows, (count, kTileColumns) each.
template <int W>
DINOV3_EXT_INLINE void pack_columns(const GramFeatures& features, const double* inverse, int64_t image, int64_t row,
                                    int64_t patches, int64_t begin, int64_t count, float* to) {
  alignas(64) float rows[W * kDepth];
  typename Vector<W>::Float square[W];
  for (int64_t n = 0; n < kBlock; n += W) {
    float* panel = to + n / kTileColumns<W> * kTileColumns<W> * kDepth + n % kTileColumns<W>;
    pack_rows<W>(features, inverse, image, row + n, W, patches, begin, count, rows);
    for (int64_t k = 0; k < count; k += W) {
      for (int i = 0; i < W; ++i) square[i] = load<W>(rows + i * kDepth + k);
      transpose<W>(square);
      for (int i = 0; i < W; ++i) store<W>(panel + (k + i) * kTileColumns<W>, square[i]);
    }
  }
}

// ---- 1. similarities, loss, differences -----------------------------------------------------------------------------

// Similarities of one side: rows of the strip's blocks up to `column`, columns of that block: (rows, kBlock).
template <int W>
DINOV3_EXT_INLINE void similarities(const Work& work, bool teacher, int64_t image, int64_t column, float* result) {
  constexpr int64_t tile = kTileRows<W>;
  const GramFeatures& features = teacher ? work.args.teacher : work.args.student;
  const double* inverse = work.inverse_norms(image, teacher);
  const int64_t patches = work.plan.patches, from = work.whole(image);
  const auto [begin, end, columns] = BlockPair(work, column);
  const Buffer<float> space(kBlock * kDepth);
  float* panels = space.data;
  alignas(64) float rows[tile * kDepth];
  for (int64_t k = 0; k < work.plan.width; k += kDepth) {
    const int64_t depth = std::min(kDepth, work.plan.width - k);
    pack_columns<W>(features, inverse, from, column * kBlock, patches, k, depth, panels);
    for (int64_t row = begin; row < end; row += tile) {
      const int64_t height = std::min(tile, end - row);
      pack_rows<W>(features, inverse, from, row, tile, patches, k, depth, rows);
      for (int64_t n = 0; n < columns; n += kTileColumns<W>) {
        if (row >= column * kBlock + n + kTileColumns<W>) continue;  // below the diagonal
        float* to = result + (row - begin) * kBlock + n;
        for (int64_t i = 0; i < depth; i += kSummed) {
          product_tile<W, kDepth, false>(height, rows + i, panels + n * kDepth + i * kTileColumns<W>,
                                         std::min(kSummed, depth - i), to, kBlock, k + i > 0);
        }
      }
    }
  }
}

// Both sides at once for narrow features, in fp64: similarities of the student, and how far the teacher's are below
// them.
template <int W>
DINOV3_EXT_INLINE void narrow_similarities(const Work& work, int64_t image, int64_t column, float* result,
                                           float* gaps) {
  const GramPlan& plan = work.plan;
  const auto [begin, end, columns] = BlockPair(work, column);
  float block[2][kBlock][kNarrow], row[kNarrow];
  for (int64_t i = begin; i < end; ++i) {
    double sums[2][kBlock] = {};
    for (const bool teacher : {false, true}) {
      const GramFeatures& features = teacher ? work.args.teacher : work.args.student;
      const double* inverse = work.inverse_norms(image, teacher);
      const int64_t from = work.whole(image);
      for (int64_t n = 0; i == begin && n < columns; ++n) {
        read_row<W>(features, from, column * kBlock + n, 0, plan.width, 1., block[teacher][n]);
      }
      read_row<W>(features, from, i, 0, plan.width, 1., row);
      for (int64_t n = 0; n < columns; ++n) {
        for (int64_t k = 0; k < plan.width; ++k) sums[teacher][n] += double(row[k]) * block[teacher][n][k];
        sums[teacher][n] *= inverse[i] * inverse[column * kBlock + n];
      }
    }
    for (int64_t n = 0; n < columns; ++n) {
      result[(i - begin) * kBlock + n] = float(sums[0][n]);
      gaps[(i - begin) * kBlock + n] = float(sums[0][n] - sums[1][n]);
    }
  }
}

// Adds the loss of one row of one block, and turns it to d' and d' S. `theirs`: the teacher's similarities, or, where
// `Gaps`, how far they are below the student's; zeros, as `similarity`, where the row is not to count. `diagonal`: of
// this row, in columns of the block, or -1.
template <int W, bool Gaps>
DINOV3_EXT_INLINE float difference_row(GramClip clip, int64_t diagonal, const float* similarity, const float* theirs,
                                       float* difference, float* along_columns, double (&loss)[W]) {
  using Float = typename Vector<W>::Float;
  const Float zero = splat<W>(0.f);
  Float total = zero, along = zero;
  const float before = diagonal < 0 ? 0.f : along_columns[diagonal];
  alignas(64) float deviations[kBlock];
  for (int64_t n = 0; n < kBlock; n += W) {
    const Float s = load<W>(similarity + n), other = load<W>(theirs + n), t = Gaps ? s - other : other;
    Float d = Gaps ? other : s - other;
    if (clip != GramClip::none) d = where_negative<W>(t, s, d);
    if (clip == GramClip::both) d = where_negative<W>(s, where_negative<W>(t, zero, -t), d);
    total += d * d;
    if (diagonal >= 0) store<W>(deviations + n, d);
    if (difference) {
      const Float gradient = clip == GramClip::both ? where_negative<W>(s, zero, d) : d;
      store<W>(difference + n, gradient);
      const Float both = gradient * s;
      along += both;
      store<W>(along_columns + n, load<W>(along_columns + n) + both);
    }
  }
  for (int lane = 0; lane < W; ++lane) loss[lane] += 2. * total[lane];
  if (diagonal >= 0) {  // once, not twice
    loss[0] -= double(deviations[diagonal]) * deviations[diagonal];
    along_columns[diagonal] = before;
  }
  return sum_lanes<W>(along);
}

// Of the similarities in `ours` and `theirs` (`difference_row`): loss, d' and t of a column.
template <int W, bool Gaps>
DINOV3_EXT_INLINE void difference_column(const Work& work, int64_t image, int64_t column, float* ours, float* theirs) {
  const GramPlan& plan = work.plan;
  const auto [begin, end, columns] = BlockPair(work, column);
  alignas(64) float along_columns[kBlock] = {}, row_of_differences[kBlock];
  float* parts = plan.gradient ? work.along_parts(image, column) : nullptr;
  double losses[W] = {}, loss = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t block = row / kBlock, diagonal = block < column ? -1 : row - column * kBlock;
    for (float* one : {ours + (row - begin) * kBlock, theirs + (row - begin) * kBlock}) {
      std::fill(one, one + std::max<int64_t>(diagonal, 0), 0.f);  // below the diagonal, and behind the last patch
      std::fill(one + columns, one + kBlock, 0.f);
    }
    const float along = difference_row<W, Gaps>(work.args.clip, diagonal, ours + (row - begin) * kBlock,
                                                theirs + (row - begin) * kBlock,
                                                plan.gradient ? row_of_differences : nullptr, along_columns, losses);
    if (!plan.gradient) continue;
    parts[row - begin] = along;
    float* to = work.differences(image, block) + (row - block * kBlock) * plan.pitch(block) + (column - block) * kBlock;
    std::copy(row_of_differences, row_of_differences + columns, to);
  }
  for (const double lane : losses) loss += lane;
  double* total = work.loss(image, column);
  *total = work.strip == 0 ? loss : *total + loss;
  if (!plan.gradient) return;
  float* along = work.along(image) + column * kBlock;
  for (int64_t n = 0; n < columns; ++n) along[n] = along_columns[n] + (work.strip == 0 ? 0.f : along[n]);
  if (column < work.last) {  // the block on the diagonal is needed whole
    float* square = work.differences(image, column);
    const int64_t pitch = plan.pitch(column);
    for (int64_t m = 0; m < columns; ++m) {
      for (int64_t n = m + 1; n < columns; ++n) square[n * pitch + m] = square[m * pitch + n];
    }
  }
}

// Columns [first, last) of blocks. `product`: similarities of one side.
template <int W, class Similarities>
DINOV3_EXT_INLINE void similarity_task(const Work& work, int64_t image, int64_t first, int64_t last,
                                       Similarities product) {
  int64_t size = 0;
  for (int64_t column = first; column < last; ++column) size += BlockPair(work, column).size();
  const Buffer<float> ours(size), theirs(size);
  const bool narrow = work.plan.width <= kNarrow;
  if (!narrow) {
    product(work, false, image, first, last, ours.data);
    product(work, true, image, first, last, theirs.data);
  }
  int64_t at = 0;
  for (int64_t column = first; column < last; at += BlockPair(work, column++).size()) {
    if (narrow) {
      narrow_similarities<W>(work, image, column, ours.data + at, theirs.data + at);
      difference_column<W, true>(work, image, column, ours.data + at, theirs.data + at);
    } else {
      difference_column<W, false>(work, image, column, ours.data + at, theirs.data + at);
    }
  }
}

// ---- 2. gradient ----------------------------------------------------------------------------------------------------

// Block (row, depth) of the differences, as the packed left side of a product, rows m .. m + tile: (tile, kBlock) where
// the depth lies to the right, (kBlock, tile) where it lies to the left and the block is stored turned.
template <int W>
DINOV3_EXT_INLINE void pack_differences(const Work& work, int64_t image, int64_t block, int64_t m, int64_t depth_block,
                                        int64_t depth, float* to) {
  constexpr int64_t tile = kTileRows<W>;
  if (depth_block < block) {
    const int64_t pitch = work.plan.pitch(depth_block);
    const float* from = work.differences(image, depth_block) + (block - depth_block) * kBlock + m;
    for (int64_t k = 0; k < depth; ++k) std::memcpy(to + k * tile, from + k * pitch, tile * sizeof(float));
  } else {
    const int64_t pitch = work.plan.pitch(block);
    const float* from = work.differences(image, block) + m * pitch + (depth_block - block) * kBlock;
    for (int64_t i = 0; i < tile; ++i) std::memcpy(to + i * kBlock, from + i * pitch, depth * sizeof(float));
  }
}

// Rows [row, row + rows) of the sums (rows, pitch): joined with earlier strips' shares, and either finished or
// kept for later strips.
template <int W>
DINOV3_EXT_INLINE void put_rows(const Work& work, int64_t image, int64_t row, int64_t rows, int64_t begin,
                                int64_t count, float* sums, int64_t pitch) {
  const GramPlan& plan = work.plan;
  const bool finished = row < work.last * kBlock;
  const double* inverse = work.inverse_norms(image, false);
  const Element element = gram_grad_element(work.args.student.element);
  const double entries = double(plan.images) * plan.patches * plan.patches;
  alignas(64) float x[std::max(kChunkColumns, kPartsColumns)];
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t i = row + m, at = (work.whole(image) * plan.patches + i) * plan.width + begin;
    float* sum = sums + m * pitch;
    float* wide = static_cast<float*>(work.args.grad) + at;
    uint16_t* high = static_cast<uint16_t*>(work.args.grad) + at;
    uint16_t* low = work.lows(image) + i * plan.width + begin;
    if (work.strip > 0) {
      if (element == Element::float32) {
        for (int64_t n = 0; n < count; ++n) sum[n] += wide[n];
      } else {
        for (int64_t n = 0; n < count; ++n) sum[n] += bits_as<float>(uint32_t(high[n]) << 16 | low[n]);
      }
    }
    if (finished) {
      const double r = inverse[i];
      const float t = r >= kLongest ? 0.f : work.along(image)[i];  // else divided by a constant
      const float factor = float(4 / entries * r);
      read_row<W>(work.args.student, work.whole(image), i, begin, count, r, x);
      for (int64_t n = 0; n < count; n += W) {  // both may be read up to a whole vector
        const auto value = factor * (load<W>(sum + n) - t * load<W>(x + n));
        if (element == Element::float32) {
          count - n >= W ? store<W>(wide + n, value) : store_tail<W>(wide + n, value, count - n);
        } else if (count - n >= W) {
          store_element<Element::bfloat16, W>(high, n, value);
        } else {
          uint16_t rounded_row[W];
          store_element<Element::bfloat16, W>(rounded_row, 0, value);
          std::copy(rounded_row, rounded_row + count - n, high + n);
        }
      }
    } else if (element == Element::float32) {
      std::copy(sum, sum + count, wide);
    } else {
      for (int64_t n = 0; n < count; ++n) {
        const uint32_t bits = bits_as<uint32_t>(sum[n]);
        high[n] = uint16_t(bits >> 16), low[n] = uint16_t(bits);
      }
    }
  }
}

// Columns [begin, begin + kChunkColumns) of the rows of blocks [first, last): all of the strip, or all below it.
template <int W>
DINOV3_EXT_INLINE void gradient_task(const Work& work, int64_t image, int64_t first, int64_t last, int64_t begin) {
  constexpr int64_t tile = kTileRows<W>;
  const GramPlan& plan = work.plan;
  const bool in_strip = first < work.last;
  const int64_t count = std::min(kChunkColumns, plan.width - begin);
  const int64_t depth_last = in_strip ? plan.blocks : work.last;
  const double* inverse = work.inverse_norms(image, false);
  const Buffer<float> panels(kBlock * kChunkColumns), sums((last - first) * kBlock * kChunkColumns);
  alignas(64) float left[tile * kBlock + 16], row[kChunkColumns];
  std::fill(row, row + kChunkColumns, 0.f);
  for (int64_t k = work.first; k < depth_last; ++k) {
    const int64_t depth = std::min(kBlock, plan.patches - k * kBlock);
    for (int64_t i = 0; i < depth; ++i) {
      const int64_t j = k * kBlock + i;
      read_row<W>(work.args.student, work.whole(image), j, begin, count, inverse[j], row);
      for (int64_t n = 0; n < kChunkColumns; n += kTileColumns<W>) {
        std::copy(row + n, row + n + kTileColumns<W>, panels.data + n * kBlock + i * kTileColumns<W>);
      }
    }
    for (int64_t block = first; block < last; ++block) {
      const int64_t rows = std::min(kBlock, plan.patches - block * kBlock);
      for (int64_t m = 0; m < rows; m += tile) {
        pack_differences<W>(work, image, block, m, k, depth, left);
        for (int64_t n = 0; n < kChunkColumns; n += kTileColumns<W>) {
          float* to = sums.data + ((block - first) * kBlock + m) * kChunkColumns + n;
          const float* right = panels.data + n * kBlock;
          const int64_t height = std::min(tile, rows - m);
          if (k < block) {
            product_tile<W, kBlock, true>(height, left, right, depth, to, kChunkColumns, k > work.first);
          } else {
            product_tile<W, kBlock, false>(height, left, right, depth, to, kChunkColumns, k > work.first);
          }
        }
      }
    }
  }
  const int64_t row_end = std::min(last * kBlock, plan.patches);
  put_rows<W>(work, image, first * kBlock, row_end - first * kBlock, begin, count, sums.data, kChunkColumns);
}

// ---- one set of functions per instruction set ----

struct Kernels {
  double (*inverse_norm)(const GramFeatures&, int64_t image, int64_t row, int64_t width);
  void (*similarities)(const Work&, int64_t image, int64_t first, int64_t last);
  void (*gradient)(const Work&, int64_t image, int64_t first, int64_t last, int64_t begin);
  bool parts;  // products of bf16 parts
};

#define KERNELS_OF(TARGET, NAME, W)                                                                            \
  TARGET double inverse_norm_##NAME(const GramFeatures& features, int64_t image, int64_t row, int64_t width) { \
    return inverse_norm<W>(features, image, row, width);                                                       \
  }                                                                                                            \
  TARGET void one_side_##NAME(const Work& work, bool teacher, int64_t image, int64_t first, int64_t last,      \
                              float* result) {                                                                 \
    for (int64_t column = first; column < last; result += BlockPair(work, column++).size()) {                  \
      similarities<W>(work, teacher, image, column, result);                                                   \
    }                                                                                                          \
  }                                                                                                            \
  TARGET void similarities_##NAME(const Work& work, int64_t image, int64_t first, int64_t last) {              \
    similarity_task<W>(work, image, first, last, one_side_##NAME);                                             \
  }                                                                                                            \
  TARGET void gradient_##NAME(const Work& work, int64_t image, int64_t first, int64_t last, int64_t begin) {   \
    gradient_task<W>(work, image, first, last, begin);                                                         \
  }                                                                                                            \
  constexpr Kernels kKernels_##NAME{inverse_norm_##NAME, similarities_##NAME, gradient_##NAME, false};

KERNELS_OF(, portable, 4)
#if defined(__x86_64__)
KERNELS_OF(DINOV3_EXT_AVX2, avx2, 8)
KERNELS_OF(DINOV3_EXT_AVX512, avx512, 16)

DINOV3_EXT_AVX512 void similarities_with_amx(const Work& work, int64_t image, int64_t first, int64_t last) {
  similarity_task<16>(work, image, first, last, similarities_amx);
}
DINOV3_EXT_AVX512 void gradient_with_amx(const Work& work, int64_t image, int64_t first, int64_t last, int64_t begin) {
  const int64_t count = std::min(work.plan.parts_columns, work.plan.width - begin);
  const int64_t rows = std::min(last * kBlock, work.plan.patches) - first * kBlock;
  const Buffer<float> sums(GramPlan::divide_up(rows, 16) * 16 * work.plan.sums_pitch());
  gradient_sums_amx(work, image, first, last, begin, count, sums.data);
  put_rows<16>(work, image, first * kBlock, rows, begin, count, sums.data, work.plan.sums_pitch());
}
constexpr Kernels kKernels_amx{inverse_norm_avx512, similarities_with_amx, gradient_with_amx, true};
#endif

const Kernels& kernels_here() {
#if defined(__x86_64__)
  if (cpu_variant() == CpuVariant::amx) return kKernels_amx;
  return choose_by_variant(kKernels_portable, kKernels_avx2, kKernels_avx512);
#else
  return kKernels_portable;
#endif
}

struct Task {
  const Work& work;
  const Kernels& kernels;
  int64_t each;  // pieces of an image
};

// Of the width, in a task.
int64_t gradient_columns(const Task& task) { return task.kernels.parts ? task.work.plan.parts_columns : kChunkColumns; }

void norms_task(int64_t begin, int64_t end, void* context) {
  const Task& task = *static_cast<const Task*>(context);
  const int64_t patches = task.work.plan.patches;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t image = i / (2 * patches), row = i % patches;
    const bool teacher = i / patches % 2;
    const GramFeatures& features = teacher ? task.work.args.teacher : task.work.args.student;
    task.work.inverse_norms(image, teacher)[row] =
        task.kernels.inverse_norm(features, task.work.whole(image), row, task.work.plan.width);
  }
}

void similarities_tasks(int64_t begin, int64_t end, void* context) {
  const Task& task = *static_cast<const Task*>(context);
  const Work& work = task.work;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = work.first + i % task.each * work.plan.columns_at_once;
    const int64_t last = std::min(first + work.plan.columns_at_once, work.plan.blocks);
    task.kernels.similarities(work, i / task.each, first, last);
  }
}

// A row's own share of t: the parts of all blocks to the right, in order.
void join_along(const Work& work) {
  for (int64_t image = 0; image < work.images; ++image) {
    float* along = work.along(image);
    for (int64_t row = work.first * kBlock; row < std::min(work.last * kBlock, work.plan.patches); ++row) {
      for (int64_t column = row / kBlock; column < work.plan.blocks; ++column) {
        along[row] += work.along_parts(image, column)[row - work.first * kBlock];
      }
    }
  }
}

void gradient_tasks(int64_t begin, int64_t end, void* context) {
  const Task& task = *static_cast<const Task*>(context);
  const Work& work = task.work;
  const int64_t each = gradient_columns(task);
  const int64_t chunks = GramPlan::divide_up(work.plan.width, each), groups = task.each / chunks;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t group = i % groups, column = i / groups % chunks * each;
    const int64_t first = group == 0 ? work.first : work.last + (group - 1) * kGroupBlocks;
    const int64_t last = group == 0 ? work.last : std::min(first + kGroupBlocks, work.plan.blocks);
    task.kernels.gradient(work, i / task.each, first, last, column);
  }
}

}  // namespace

int64_t gram_loss_workspace_cpu(const GramLoss& args) { return GramPlan(args).total; }

void gram_loss_cpu(const GramLoss& args, ParallelFor parallel_for) {
  const GramPlan plan(args);
  const Kernels& kernels = kernels_here();
  const uintptr_t address = reinterpret_cast<uintptr_t>(args.workspace);
  Work work{args, plan, static_cast<char*>(args.workspace) + (64 - address % 64) % 64, 0, 0, 0, 0, 0};
  double loss = 0;
  for (; work.round < plan.rounds; ++work.round) {
    work.images = GramPlan::divide_up(plan.images - work.round, plan.rounds);
    Task task{work, kernels, 2 * plan.patches};
    parallel_for(0, work.images * task.each, norms_task, &task);
    for (work.strip = 0; work.strip < plan.strips(); ++work.strip) {
      work.first = work.strip * plan.strip_blocks;
      work.last = std::min(work.first + plan.strip_blocks, plan.blocks);
      task.each = GramPlan::divide_up(plan.blocks - work.first, plan.columns_at_once);
      parallel_for(0, work.images * task.each, similarities_tasks, &task);
      if (!plan.gradient) continue;
      join_along(work);
      task.each = GramPlan::divide_up(plan.width, gradient_columns(task)) *
                  (1 + GramPlan::divide_up(plan.blocks - work.last, kGroupBlocks));
      parallel_for(0, work.images * task.each, gradient_tasks, &task);
    }
    for (int64_t i = 0; i < work.images * plan.blocks; ++i) loss += work.loss(0, 0)[i];
  }
  *args.loss = float(loss / (double(plan.images) * plan.patches * plan.patches));
}

}  // namespace dinov3_ext
