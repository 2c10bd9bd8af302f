// The products of gram_loss on AMX tiles, of features taken as sums of bf16 parts (core/cpu_parts.h). A row is scaled
// to a length in [1/2, 1] by a power of two first, so that no part of what matters is subnormal; the rest of the
// normalisation follows the sum.
#if defined(__x86_64__)
#include <cstring>

#include "core/cpu_parts.h"
#include "core/cpu_tile.h"
#include "ops/gram_loss/gram_loss_cpu.h"

namespace dinov3_ext::gram {
namespace {

using namespace parts;

constexpr int W = 16;
constexpr int64_t kPanel = 16;   // columns
constexpr int64_t kDepth = 256;  // of the width, packed at a time for similarities

// Turns a tile of 16 lines: word w of line r becomes word r of line w.
DINOV3_EXT_INLINE void turn_tile(const char* from, char* to) {
  Float square[W];
  for (int i = 0; i < W; ++i) square[i] = load_words<W>(from + i * kLine);
  transpose<W>(square);
  for (int i = 0; i < W; ++i) std::memcpy(to + i * kLine, &square[i], kLine);
}

// The power of two near a row's 1 / norm, and what is left of it.
DINOV3_EXT_INLINE double power_near(double inverse) { return std::ldexp(1., std::ilogb(inverse)); }

// Rows [row, row + rows) of features scaled by a power of two, rows a multiple of 16: left operands. Part p, step s,
// row r: a line at to + p * part_stride + (s * rows + r) * 64. Zeros below the last patch and behind the last column.
DINOV3_EXT_INLINE void pack_left(const GramFeatures& features, const double* inverse, int64_t image, int64_t row,
                                 int64_t rows, int64_t patches, int64_t begin, int64_t count, int parts, char* to,
                                 int64_t part_stride) {
  alignas(64) float numbers[kDepth];
  const int64_t steps = GramPlan::divide_up(count, kStep);
  for (int64_t r = 0; r < rows; ++r) {
    const bool inside = row + r < patches;
    if (inside) read_row<W>(features, image, row + r, begin, count, power_near(inverse[row + r]), numbers);
    std::fill(numbers + (inside ? count : 0), numbers + steps * kStep, 0.f);
    for (int64_t s = 0; s < steps; ++s) {
      store_parts(load<W>(numbers + s * kStep), load<W>(numbers + s * kStep + W), parts, to + (s * rows + r) * 64,
                  part_stride);
    }
  }
}

}  // namespace

// ---- 1. similarities ----

DINOV3_EXT_AMX void similarities_amx(const Work& work, bool teacher, int64_t image, int64_t column, float* result) {
  const AmxTiles tiles;
  const GramFeatures& features = teacher ? work.args.teacher : work.args.student;
  const double* inverse = work.inverse_norms(image, teacher);
  const int64_t patches = work.plan.patches, from = work.first_image + image, width = work.plan.width;
  const auto [begin, end, columns] = BlockPair(work, column);
  const int parts = parts_of(features.element);
  constexpr int64_t kPanels = kBlock / kPanel, kMostSteps = kDepth / kStep;
  // A block of 96 rows as left operands, and the block of columns as right ones. The same where they meet.
  constexpr int64_t kPart = kMostSteps * kPanels * kTile;
  const Buffer<char> left(parts * kPart), right(parts * kPart);
  for (int64_t k = 0; k < width; k += kDepth) {
    const int64_t depth = std::min(kDepth, width - k), steps = GramPlan::divide_up(depth, kStep);
    pack_left(features, inverse, from, column * kBlock, kBlock, patches, k, depth, parts, left.data, kPart);
    for (int64_t tile = 0; tile < parts * kMostSteps * kPanels; ++tile) {
      if (tile % (kMostSteps * kPanels) >= steps * kPanels) continue;
      turn_tile(left.data + tile * kTile, right.data + tile * kTile);
    }
    // From the last block on: the one on the diagonal, if it is there, has its left operands already.
    for (int64_t row = (end - 1 - begin) / kBlock * kBlock + begin; row >= begin; row -= kBlock) {
      if (row != column * kBlock) {
        pack_left(features, inverse, from, row, kBlock, patches, k, depth, parts, left.data, kPart);
      }
      const PartProduct given{{left.data, kPart, kPanels * kTile, parts},
                              {right.data, kPart, kPanels * kTile, parts},
                              steps,
                              reinterpret_cast<char*>(result + (row - begin) * kBlock),
                              kBlock * 4,
                              kLine,
                              k > 0};
      const int64_t row_tiles = GramPlan::divide_up(std::min(kBlock, end - row), kPanel);
      if (row != column * kBlock) {
        multiply_panels(given, row_tiles, GramPlan::divide_up(columns, kPanel));
        continue;
      }
      for (int64_t panel = 0; panel < row_tiles; panel += 2) {  // down to the diagonal
        for (int64_t tile = 0; tile <= panel; tile += 2) multiply_tiles<32, 2>(given, tile, panel);
      }
    }
  }
  // What the powers of two left of the norms.
  alignas(64) float rest[kBlock] = {};
  for (int64_t n = 0; n < columns; ++n) {
    const double r = inverse[column * kBlock + n];
    rest[n] = float(r / power_near(r));
  }
  for (int64_t row = begin; row < end; ++row) {
    const float own = float(inverse[row] / power_near(inverse[row]));
    float* to = result + (row - begin) * kBlock;
    for (int64_t n = 0; n < kBlock; n += W) store<W>(to + n, load<W>(to + n) * (load<W>(rest + n) * own));
  }
}

// ---- 2. gradient ----

namespace {

// F[i, j] = d'[i, j] / norm[j], but for the power of two that the packed features have, of block `block` (rows i) and
// block `depth_block` (j), as left operands: three steps of six tiles.
DINOV3_EXT_INLINE void pack_differences(const Work& work, int64_t image, int64_t block, int64_t depth_block,
                                        const float* rest, int parts, char* to, int64_t part_stride) {
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
        store_parts(load<W>(a) * load<W>(r), load<W>(a + W) * load<W>(r + W), parts, to + (s * kBlock + i) * 64,
                    part_stride);
      }
    }
    return;
  }
  // Stored turned, as rows j.
  const int64_t pitch = work.plan.pitch(depth_block), rows = std::min(kBlock, work.plan.patches - block * kBlock);
  const float* from = work.differences(image, depth_block) + (block - depth_block) * kBlock;
  alignas(64) char square[kMostParts][kTile];
  for (int64_t s = 0; s < kBlock / kStep; ++s) {
    for (int64_t tile = 0; tile < kTiles; ++tile) {
      const int64_t count = std::min<int64_t>(W, rows - tile * W);
      if (count <= 0) {
        for (int part = 0; part < parts; ++part)
          std::memset(to + part * part_stride + (s * kTiles + tile) * kTile, 0, kTile);
        continue;
      }
      for (int64_t w = 0; w < W; ++w) {
        const float* low = from + (s * kStep + w) * pitch + tile * W;
        const float* high = low + W * pitch;
        const float a = rest[s * kStep + w], b = rest[s * kStep + w + W];
        if (count == W) {
          store_parts(load<W>(low) * a, load<W>(high) * b, parts, square[0] + w * 64, kTile);
        } else {
          store_parts(load_tail<W>(low, count) * a, load_tail<W>(high, count) * b, parts, square[0] + w * 64, kTile);
        }
      }
      for (int part = 0; part < parts; ++part) {
        turn_tile(square[part], to + part * part_stride + (s * kTiles + tile) * kTile);
      }
    }
  }
}

}  // namespace

DINOV3_EXT_AMX void gradient_sums_amx(const Work& work, int64_t image, int64_t first, int64_t last, int64_t begin,
                                      int64_t count, float* sums) {
  const AmxTiles tiles;
  const GramPlan& plan = work.plan;
  const int64_t depth_last = first < work.last ? plan.blocks : work.last;
  const double* inverse = work.inverse_norms(image, false);
  const GramFeatures& student = work.args.student;
  const int parts = parts_of(student.element);
  const int entries = student.element == Element::float32 ? 3 : 2;  // parts of F
  constexpr int64_t kPanels = kPartsColumns / kPanel, kSteps = kBlock / kStep;
  constexpr int64_t kLeftPart = kBlock / 16 * kSteps * kTile, kRightPart = kSteps * kPanels * kTile;
  const int64_t panels = GramPlan::divide_up(count, kPanel);
  const Buffer<char> left(entries * kLeftPart), right(parts * kRightPart);
  alignas(64) float rows[2][kPartsColumns] = {}, rest[kBlock];
  for (int64_t k = work.first; k < depth_last; ++k) {
    const int64_t depth = std::min(kBlock, plan.patches - k * kBlock);
    for (int64_t i = 0; i < kBlock; ++i) {
      const double r = i < depth ? inverse[k * kBlock + i] : 0.;
      rest[i] = i < depth ? float(r / power_near(r)) : 0.f;
    }
    for (int64_t s = 0; s < kSteps; ++s) {
      for (int64_t w = 0; w < W; ++w) {
        for (int half = 0; half < 2; ++half) {
          const int64_t i = s * kStep + half * W + w, j = k * kBlock + i;
          if (i < depth) {
            read_row<W>(student, work.first_image + image, j, begin, count, power_near(inverse[j]), rows[half]);
          } else {
            std::fill(rows[half], rows[half] + kPartsColumns, 0.f);
          }
        }
        for (int64_t n = 0; n < panels; ++n) {
          store_parts(load<W>(rows[0] + n * W), load<W>(rows[1] + n * W), parts,
                      right.data + (s * kPanels + n) * kTile + w * 64, kRightPart);
        }
      }
    }
    for (int64_t block = first; block < last; ++block) {
      pack_differences(work, image, block, k, rest, entries, left.data, kLeftPart);
      const PartProduct given{{left.data, kLeftPart, kBlock / 16 * kTile, entries},
                              {right.data, kRightPart, kPanels * kTile, parts},
                              kSteps,
                              reinterpret_cast<char*>(sums + (block - first) * kBlock * kPartsColumns),
                              kPartsColumns * 4,
                              kLine,
                              k > work.first};
      const int64_t height = std::min(kBlock, plan.patches - block * kBlock);
      multiply_panels(given, GramPlan::divide_up(height, 16), panels);
    }
  }
}

}  // namespace dinov3_ext::gram
#endif
