// The products of gram_loss on AMX tiles, of features taken as sums of bf16 parts (core/cpu_parts.h). A row is scaled
// to a length in [1/2, 1] by a power of two first, so that no part of what matters is subnormal; the rest of the
// normalisation follows the sum. bf16 features of moderate lengths need neither parts nor scaling: left operands are
// read where they lie.
#if defined(__x86_64__)
#include <cstring>

#include "core/cpu_parts.h"
#include "core/cpu_tile.h"
#include "ops/gram_loss/gram_loss_cpu.h"

namespace dinov3_ext::gram {
namespace {

using namespace parts;

constexpr int W = 16;
constexpr int64_t kPanel = 16;  // columns
// Of the width, packed at a time for similarities: the operands stay near the first cache.
template <int Parts>
constexpr int64_t kDepth = Parts == 1   ? 256
                           : Parts == 2 ? 128
                                        : 64;

// Turns a tile of 16 lines: word w of line r becomes word r of line w.
DINOV3_EXT_INLINE void turn_tile(const char* from, int64_t line, char* to) {
  Float square[W];
  for (int i = 0; i < W; ++i) square[i] = load_words<W>(from + i * line);
  transpose<W>(square);
  for (int i = 0; i < W; ++i) std::memcpy(to + i * kLine, &square[i], kLine);
}

// The power of two near a row's 1 / norm, and what is left of it.
DINOV3_EXT_INLINE double power_near(double inverse) { return std::ldexp(1., std::ilogb(inverse)); }

// Whether the features of an image are bf16 numbers that can be multiplied as they lie, and no product of two rows
// leaves the range of fp32 or loses what counts to AMX, which takes subnormal numbers for zero. Of both sides: products
// are summed in another order then, and equal features must have equal similarities.
bool is_plain(const Work& work, int64_t image) {
  for (const GramFeatures* features : {&work.args.student, &work.args.teacher}) {
    if (features->element != Element::bfloat16 || features->column_stride != 1) return false;
  }
  const double* inverse = work.inverse_norms(image, false);  // the teacher's lie behind
  const auto moderate = [](double r) { return r > 0x1p-39 && r < 0x1p39; };
  return work.plan.width % kStep == 0 && std::all_of(inverse, inverse + 2 * work.plan.patches, moderate);
}

// Of a factor 1 / norm what the packed features do not have.
DINOV3_EXT_INLINE float rest_of(double inverse, bool plain) {
  return float(plain ? inverse : inverse / power_near(inverse));
}

// Rows of features lie apart, a page or more, where no hardware foresees them.
constexpr int64_t kRowsAhead = 6;
DINOV3_EXT_INLINE void prefetch_row(const GramFeatures& features, int64_t image, int64_t row, int64_t begin,
                                    int64_t count) {
  if (features.column_stride != 1) return;
  const int64_t size = features.element == Element::float32 ? 4 : 2;
  const char* from = static_cast<const char*>(features.data) +
                     (image * features.image_stride + row * features.row_stride + begin) * size;
  for (int64_t at = 0; at < count * size; at += kLine) __builtin_prefetch(from + at);
}

// Rows [row, row + kBlock) of features scaled by a power of two: left operands. Part p, step s, row r: a line at to + p
// * part_stride + (s * kBlock + r) * 64. Zeros below the last patch and behind the last column.
template <int Parts>
DINOV3_EXT_INLINE void pack_left(const GramFeatures& features, const double* inverse, int64_t image, int64_t row,
                                 int64_t patches, int64_t begin, int64_t count, char* to, int64_t part_stride) {
  alignas(64) float numbers[kDepth<Parts>];
  const int64_t steps = GramPlan::divide_up(count, kStep);
  for (int64_t r = 0; r < kBlock; ++r) {
    const bool inside = row + r < patches;
    if (row + r + kRowsAhead < patches) prefetch_row(features, image, row + r + kRowsAhead, begin, count);
    if (inside) read_row<W>(features, image, row + r, begin, count, power_near(inverse[row + r]), numbers);
    std::fill(numbers + (inside ? count : 0), numbers + steps * kStep, 0.f);
    for (int64_t s = 0; s < steps; ++s) {
      store_parts<Parts>(load<W>(numbers + s * kStep), load<W>(numbers + s * kStep + W), to + (s * kBlock + r) * kLine,
                         part_stride);
    }
  }
}

// The same of plain features: where they lie, or copied where zeros must follow the last patch.
DINOV3_EXT_INLINE Operand plain_left(const GramFeatures& features, int64_t image, int64_t row, int64_t patches,
                                     int64_t begin, int64_t count, char* copy) {
  const char* from =
      static_cast<const char*>(features.data) + (image * features.image_stride + row * features.row_stride + begin) * 2;
  const int64_t rows = std::min(kBlock, patches - row), stride = features.row_stride * 2;
  if (rows % 32 == 0) return {from, 0, kLine, 1, stride};
  for (int64_t r = 0; r < rows; ++r) std::memcpy(copy + r * count * 2, from + r * stride, count * 2);
  std::memset(copy + rows * count * 2, 0, (GramPlan::divide_up(rows, 32) * 32 - rows) * count * 2);
  return {copy, 0, kLine, 1, count * 2};
}

// ---- 1. similarities ----

// Splitting a number into parts takes as long as multiplying it with the 96 rows of a block, so a block of rows is
// split once and multiplied with all columns of the task to the right of it. From the last block on: those that are a
// column's, too, become its right operands.
template <int Parts>
DINOV3_EXT_AMX void similarities_of(const Work& work, bool teacher, int64_t image, int64_t first, int64_t last,
                                    float* result) {
  const AmxTiles tiles;
  const GramFeatures& features = teacher ? work.args.teacher : work.args.student;
  const double* inverse = work.inverse_norms(image, teacher);
  const int64_t patches = work.plan.patches, from = work.whole(image), width = work.plan.width;
  const bool plain = Parts == 1 && is_plain(work, image);
  constexpr int64_t kPanels = kBlock / kPanel, kMostSteps = kDepth<Parts> / kStep;
  constexpr int64_t kPart = kMostSteps * kPanels * kTile;
  const Buffer<char> left(Parts * kPart), right((last - first) * Parts * kPart);
  for (int64_t k = 0; k < width; k += kDepth<Parts>) {
    const int64_t depth = std::min(kDepth<Parts>, width - k), steps = GramPlan::divide_up(depth, kStep);
    for (int64_t block = last - 1; block >= work.first; --block) {
      if (block < first && block >= work.last) continue;  // below the strip, left of the columns
      const int64_t row_tiles = GramPlan::divide_up(std::min(kBlock, patches - block * kBlock), kPanel);
      Operand rows{left.data, kPart, kPanels * kTile, Parts};
      if (plain) {
        rows = plain_left(features, from, block * kBlock, patches, k, depth, left.data);
      } else {
        pack_left<Parts>(features, inverse, from, block * kBlock, patches, k, depth, left.data, kPart);
      }
      if (block >= first) {
        char* own = right.data + (block - first) * Parts * kPart;
        for (int64_t part = 0; part < Parts; ++part) {
          for (int64_t s = 0; s < steps; ++s) {
            for (int64_t tile = 0; tile < GramPlan::divide_up(row_tiles, 2) * 2; ++tile) {
              turn_tile(rows.data + part * rows.part_stride + s * rows.step_stride + tile * 16 * rows.line, rows.line,
                        own + part * kPart + (s * kPanels + tile) * kTile);
            }
          }
        }
      }
      if (block >= work.last) continue;
      float* to = result + (block - work.first) * kBlock * kBlock;
      for (int64_t column = first; column < last; to += BlockPair(work, column++).size()) {
        if (column < block) continue;
        const Operand columns{right.data + (column - first) * Parts * kPart, kPart, kPanels * kTile, Parts};
        const PartProduct given{rows, columns, steps, reinterpret_cast<char*>(to), kBlock * 4, kLine, k > 0};
        if (column > block) {
          multiply_panels(given, row_tiles, GramPlan::divide_up(BlockPair(work, column).columns, kPanel));
          continue;
        }
        for (int64_t panel = 0; panel < row_tiles; panel += 2) {  // down to the diagonal
          for (int64_t tile = 0; tile <= panel; tile += 2) multiply_tiles<32, 2>(given, tile, panel);
        }
      }
    }
  }
  // What the powers of two left of the norms.
  for (int64_t column = first; column < last; ++column) {
    const BlockPair pair(work, column);
    alignas(64) float rest[kBlock] = {};
    for (int64_t n = 0; n < pair.columns; ++n) rest[n] = rest_of(inverse[column * kBlock + n], plain);
    for (int64_t row = pair.begin; row < pair.end; ++row) {
      const float own = rest_of(inverse[row], plain);
      float* to = result + (row - pair.begin) * kBlock;
      for (int64_t n = 0; n < kBlock; n += W) store<W>(to + n, load<W>(to + n) * (load<W>(rest + n) * own));
    }
    result += pair.size();
  }
}

// ---- 2. gradient ----

// F[i, j] = d'[i, j] / norm[j], but for the power of two that the packed features have, of block `block` (rows i) and
// block `depth_block` (j), as left operands: three steps of six tiles.
template <int Entries>
DINOV3_EXT_INLINE void pack_differences(const Work& work, int64_t image, int64_t block, int64_t depth_block,
                                        const float* rest, char* to, int64_t part_stride) {
  constexpr int64_t kTiles = kBlock / 16;
  if (depth_block >= block) {  // as they lie
    const int64_t pitch = work.plan.pitch(block), rows = std::min(kBlock, work.plan.patches - block * kBlock);
    const int64_t depth = std::min(kBlock, work.plan.patches - depth_block * kBlock);
    const float* from = work.differences(image, block) + (depth_block - block) * kBlock;
    alignas(64) float numbers[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) {
      if (i < rows) std::memcpy(numbers, from + i * pitch, depth * sizeof(float));
      std::fill(numbers + (i < rows ? depth : 0), numbers + kBlock, 0.f);
      for (int64_t s = 0; s < kBlock / kStep; ++s) {
        const float *a = numbers + s * kStep, *r = rest + s * kStep;
        store_parts<Entries>(load<W>(a) * load<W>(r), load<W>(a + W) * load<W>(r + W), to + (s * kBlock + i) * 64,
                             part_stride);
      }
    }
    return;
  }
  // Stored turned, as rows j.
  const int64_t pitch = work.plan.pitch(depth_block), rows = std::min(kBlock, work.plan.patches - block * kBlock);
  const float* from = work.differences(image, depth_block) + (block - depth_block) * kBlock;
  alignas(64) char square[Entries][kTile];
  for (int64_t s = 0; s < kBlock / kStep; ++s) {
    for (int64_t tile = 0; tile < kTiles; ++tile) {
      const int64_t count = std::min<int64_t>(W, rows - tile * W);
      if (count <= 0) {
        for (int part = 0; part < Entries; ++part)
          std::memset(to + part * part_stride + (s * kTiles + tile) * kTile, 0, kTile);
        continue;
      }
      for (int64_t w = 0; w < W; ++w) {
        const float* low = from + (s * kStep + w) * pitch + tile * W;
        const float* high = low + W * pitch;
        const float a = rest[s * kStep + w], b = rest[s * kStep + w + W];
        if (count == W) {
          store_parts<Entries>(load<W>(low) * a, load<W>(high) * b, square[0] + w * 64, kTile);
        } else {
          store_parts<Entries>(load_tail<W>(low, count) * a, load_tail<W>(high, count) * b, square[0] + w * 64, kTile);
        }
      }
      for (int part = 0; part < Entries; ++part) {
        turn_tile(square[part], kLine, to + part * part_stride + (s * kTiles + tile) * kTile);
      }
    }
  }
}

// Rows of block `depth_block` of the student, scaled by a power of two: right operands, `panels` tiles a step.
template <int Parts>
DINOV3_EXT_INLINE void pack_right(const Work& work, int64_t image, int64_t depth_block, int64_t begin, int64_t count,
                                  int64_t panels, char* to, int64_t part_stride) {
  const double* inverse = work.inverse_norms(image, false);
  const int64_t first = depth_block * kBlock, depth = std::min(kBlock, work.plan.patches - first);
  alignas(64) float rows[2][kPartsColumns] = {};
  for (int64_t line = 0; line < kBlock / 2; ++line) {
    const int64_t s = line / W, w = line % W;
    for (int half = 0; half < 2; ++half) {
      const int64_t i = s * kStep + half * W + w;
      if (i + kRowsAhead < depth) {
        prefetch_row(work.args.student, work.whole(image), first + i + kRowsAhead, begin, count);
      }
      if (i < depth) {
        read_row<W>(work.args.student, work.whole(image), first + i, begin, count, power_near(inverse[first + i]),
                    rows[half]);
      } else {
        std::fill(rows[half], rows[half] + kPartsColumns, 0.f);
      }
    }
    for (int64_t n = 0; n < panels; ++n) {
      store_parts<Parts>(load<W>(rows[0] + n * W), load<W>(rows[1] + n * W), to + (s * panels + n) * kTile + w * kLine,
                         part_stride);
    }
  }
}

// The same of plain features: two rows become the words of lines.
DINOV3_EXT_INLINE void plain_right(const Work& work, int64_t image, int64_t depth_block, int64_t begin, int64_t panels,
                                   char* to) {
  alignas(64) static constexpr uint16_t kNothing[kPartsColumns] = {};
  const GramFeatures& student = work.args.student;
  const int64_t first = depth_block * kBlock, depth = std::min(kBlock, work.plan.patches - first);
  const uint16_t* block = static_cast<const uint16_t*>(student.data) + work.whole(image) * student.image_stride +
                          first * student.row_stride + begin;
  for (int64_t line = 0; line < kBlock / 2; ++line) {
    const int64_t s = line / W, w = line % W, i = s * kStep + w;
    const uint16_t* low = i < depth ? block + i * student.row_stride : kNothing;
    const uint16_t* high = i + W < depth ? block + (i + W) * student.row_stride : kNothing;
    for (int64_t n = 0; n < panels; ++n) {
      const Unsigned words = bits_as<Unsigned>(load_element<Element::bfloat16, W>(low, n * W)) >> 16 |
                             bits_as<Unsigned>(load_element<Element::bfloat16, W>(high, n * W));
      std::memcpy(to + (s * panels + n) * kTile + w * kLine, &words, sizeof(words));
    }
  }
}

template <int Parts, int Entries>
DINOV3_EXT_AMX void gradient_of(const Work& work, int64_t image, int64_t first, int64_t last, int64_t begin,
                                int64_t count, float* sums) {
  const AmxTiles tiles;
  const GramPlan& plan = work.plan;
  const int64_t depth_last = first < work.last ? plan.blocks : work.last;
  const double* inverse = work.inverse_norms(image, false);
  constexpr int64_t kSteps = kBlock / kStep, kLeftPart = kBlock / 16 * kSteps * kTile;
  const int64_t panels = GramPlan::divide_up(count, kPanel), right_part = kSteps * panels * kTile;
  const Buffer<char> left(Entries * kLeftPart), right(Parts * right_part);
  alignas(64) float rest[kBlock];
  const bool plain = Parts == 1 && is_plain(work, image);
  for (int64_t k = work.first; k < depth_last; ++k) {
    const int64_t depth = std::min(kBlock, plan.patches - k * kBlock);
    for (int64_t i = 0; i < kBlock; ++i) rest[i] = i < depth ? rest_of(inverse[k * kBlock + i], plain) : 0.f;
    if (plain) {
      plain_right(work, image, k, begin, panels, right.data);
    } else {
      pack_right<Parts>(work, image, k, begin, count, panels, right.data, right_part);
    }
    for (int64_t block = first; block < last; ++block) {
      pack_differences<Entries>(work, image, block, k, rest, left.data, kLeftPart);
      const PartProduct given{{left.data, kLeftPart, kBlock / 16 * kTile, Entries},
                              {right.data, right_part, panels * kTile, Parts},
                              kSteps,
                              reinterpret_cast<char*>(sums + (block - first) * kBlock * plan.sums_pitch()),
                              plan.sums_pitch() * 4,
                              kLine,
                              k > work.first};
      const int64_t height = std::min(kBlock, plan.patches - block * kBlock);
      multiply_panels(given, GramPlan::divide_up(height, 16), panels);
    }
  }
}

}  // namespace

void similarities_amx(const Work& work, bool teacher, int64_t image, int64_t first, int64_t last, float* result) {
  switch ((teacher ? work.args.teacher : work.args.student).element) {
    case Element::bfloat16: return similarities_of<1>(work, teacher, image, first, last, result);
    case Element::float16: return similarities_of<2>(work, teacher, image, first, last, result);
    case Element::float32: return similarities_of<3>(work, teacher, image, first, last, result);
  }
}

// F in two parts where the gradient is rounded to 16 bits.
void gradient_sums_amx(const Work& work, int64_t image, int64_t first, int64_t last, int64_t begin, int64_t count,
                       float* sums) {
  switch (work.args.student.element) {
    case Element::bfloat16: return gradient_of<1, 2>(work, image, first, last, begin, count, sums);
    case Element::float16: return gradient_of<2, 2>(work, image, first, last, begin, count, sums);
    case Element::float32: return gradient_of<3, 3>(work, image, first, last, begin, count, sums);
  }
}

}  // namespace dinov3_ext::gram
#endif
