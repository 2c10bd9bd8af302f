// Similarities of both tensors on one tile of the lower triangle: loss, F, and the sums for t. No N x N matrix of
// similarities exists outside of registers.
//
// A block of 8 warps owns 128 x 128 (4 warps: 64 x 64) pairs of rows, and walks the width in steps of 32: first the
// student's, then the teacher's, into two sets of accumulators (2 x 64 registers a thread). Per step it loads 2 tiles
// (1 on the diagonal) of 8 KB per part, three steps (four with one part) in flight: 96 KB with two parts, what every
// architecture has. Per 32 KB a warp issues 96 products against 28 matrix loads and 8 asynchronous copies, so tensor
// cores bound it everywhere. Both tensors side by side in one step would need 64 KB a step: two steps, 128 KB.
#pragma once

#include "core/block_reduce.cuh"
#include "ops/gram_loss/gram_loss_cuda.cuh"

namespace dinov3_ext {

template <int Tile, int Parts>
struct GramTiles {
  static constexpr int kStages = Parts == 2 ? 3 : 4;
  static constexpr int kOperandBytes = Tile * kGramDepth * 2;
  static constexpr int kStageBytes = 2 * Parts * kOperandBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kStagedBytes = Parts * Tile * Tile * 2;  // F, where the steps' operands were
  static_assert(kStagedBytes + (GramTile<Tile>::kAcross + GramTile<Tile>::kDown) * Tile * 4 + 32 <= kSharedBytes);
};

// Starts copying the operands of one step, 32 columns of two blocks of rows; one, where they are the same.
template <int Tile, int Parts>
__device__ __forceinline__ void start_features(const GramWork& work, const uint16_t* rows, const uint16_t* columns,
                                               int valid_rows, int valid_columns, uint32_t stage) {
  constexpr int kThreads = GramTile<Tile>::kThreads, kBytes = GramTiles<Tile, Parts>::kOperandBytes;
  const int64_t plane = int64_t(work.patches) * work.packed_width;
#pragma unroll
  for (int part = 0; part < Parts; ++part) {
    copy_tile_async<Tile, kThreads>(dinov3_ext::Tile<kGramDepth>{stage + uint32_t(part * kBytes)}, rows + part * plane,
                                    work.packed_width, valid_rows);
  }
  if (columns == rows) return;
#pragma unroll
  for (int part = 0; part < Parts; ++part) {
    copy_tile_async<Tile, kThreads>(dinov3_ext::Tile<kGramDepth>{stage + uint32_t((Parts + part) * kBytes)},
                                    columns + part * plane, work.packed_width, valid_columns);
  }
}

// Adds one step's products.
template <int Tile, int Parts, int MT, int NT>
__device__ __forceinline__ void add_step(float (&sums)[MT][NT][4], uint32_t stage, bool diagonal) {
  using Layout = GramTile<Tile>;
  using Operand = dinov3_ext::Tile<kGramDepth>;
  constexpr uint32_t kBytes = GramTiles<Tile, Parts>::kOperandBytes;
  const uint32_t right = diagonal ? stage : stage + Parts * kBytes;
#pragma unroll 1  // unrolled, the larger tile with two parts spills up to 32 bytes
  for (int k = 0; k < kGramDepth; k += 32 / Parts) {
    const int second = Parts == 2 ? k : k + 16;  // the low part, or the next 16 columns
    const uint32_t low = Parts == 2 ? kBytes : 0;
    uint32_t b[2][NT / 2][4];
    load_right_rows<NT>(b[0], Operand{right}, Layout::column(), k);
    load_right_rows<NT>(b[1], Operand{right + low}, Layout::column(), second);
    // 16 rows on, a tile's addresses are 16 rows' bytes on.
    const uint32_t first = left_address(Operand{stage}, Layout::row(), k, lane_index());
    const uint32_t other = left_address(Operand{stage + low}, Layout::row(), second, lane_index());
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      uint32_t a[2][4];
      load_matrices(a[0], first + uint32_t(16 * m * Operand::kRowBytes));
      load_matrices(a[1], other + uint32_t(16 * m * Operand::kRowBytes));
      add_products<Parts>(sums[m], a, b);
    }
  }
}

// Sums over the lanes that hold the same row (mask 1, 2) or column (mask 4, 8, 16) of accumulators.
__device__ __forceinline__ float sum_of_row(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}
__device__ __forceinline__ float sum_of_column(float value) {
  value += shuffle_xor(value, 4);
  value += shuffle_xor(value, 8);
  return value + shuffle_xor(value, 16);
}

// Rounds F, held in `f`, into shared memory. f is left with what its parts did not hold.
template <int Tile, int Parts, int MT, int NT>
__device__ __forceinline__ void stage_entries(float (&f)[MT][NT][4], uint32_t shared) {
  using Layout = GramTile<Tile>;
#pragma unroll
  for (int part = 0; part < Parts; ++part) {
    const dinov3_ext::Tile<Tile> staged{shared + uint32_t(part * Tile * Tile * 2)};
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int q = 0; q < 4; q += 2) {
          const uint32_t rounded = pack<kGramElement>(f[m][n][q], f[m][n][q + 1]);
          if (part + 1 < Parts) {
            const float2 taken = unpack<kGramElement>(rounded);
            f[m][n][q] -= taken.x, f[m][n][q + 1] -= taken.y;
          }
          store_shared(
              staged.element(Layout::row() + 16 * m + accumulator_row(q), Layout::column() + accumulator_column(n, q)),
              rounded);
        }
      }
    }
  }
}

// Writes the staged F in 16-byte pieces.
template <int Tile, int Parts>
__device__ __forceinline__ void store_entries(uint16_t* to, uint32_t shared) {
  constexpr int kChunks = Tile / 8;
#pragma unroll 4
  for (int index = thread_index(); index < Parts * Tile * kChunks; index += GramTile<Tile>::kThreads) {
    const int part = index / (Tile * kChunks), row = index / kChunks % Tile, chunk = index % kChunks;
    const dinov3_ext::Tile<Tile> staged{shared + uint32_t(part * Tile * Tile * 2)};
    store_global(reinterpret_cast<uint4*>(to) + index, load_shared<uint4>(staged.address(row, chunk)));
  }
}

// grid (tiles, images)
template <int Tile, int Parts>
__global__ void __launch_bounds__(GramTile<Tile>::kThreads, Tile == 64 ? 3 : 1) gram_tiles(GramWork work) {
  using Layout = GramTile<Tile>;
  using Stages = GramTiles<Tile, Parts>;
  constexpr int MT = Layout::MT, NT = Layout::NT;
  const int index = int(block_index<0>());
  const int64_t image = block_index<1>();
  int row_block, column_block;
  triangle_place(index, row_block, column_block);
  const bool diagonal = row_block == column_block;
  const uint32_t shared = shared_base();

  const int depth_steps = (work.width + kGramDepth - 1) / kGramDepth, steps = 2 * depth_steps;
  const auto stage_of = [&](int step) { return shared + uint32_t(step % Stages::kStages * Stages::kStageBytes); };
  const uint16_t* const packed = work.student + image * Parts * work.patches * work.packed_width;
  const uint16_t* const rows = packed + int64_t(row_block * Tile) * work.packed_width;
  const uint16_t* const columns = packed + int64_t(column_block * Tile) * work.packed_width;
  const int valid_rows = work.patches - row_block * Tile, valid_columns = work.patches - column_block * Tile;
  const auto start = [&](int step) {
    if (step < steps) {
      const int64_t offset = step < depth_steps ? int64_t(step) * kGramDepth
                                                : work.teacher - work.student + (step - depth_steps) * kGramDepth;
      start_features<Tile, Parts>(work, rows + offset, columns + offset, valid_rows, valid_columns, stage_of(step));
    }
    copy_async_commit();
  };
#pragma unroll
  for (int step = 0; step < Stages::kStages - 1; ++step) start(step);
  const auto next = [&](int step) {
    copy_async_wait<Stages::kStages - 2>();
    block_barrier();  // step `step` is there for all, and none still reads step `step - 1`, whose place is filled next
    start(step + Stages::kStages - 1);
  };
  float student[MT][NT][4] = {};
#pragma unroll 1
  for (int step = 0; step < depth_steps; ++step) {
    next(step);
    add_step<Tile, Parts>(student, stage_of(step), diagonal);
  }
  float teacher[MT][NT][4] = {};  // not before: 64 registers
#pragma unroll 1
  for (int step = depth_steps; step < steps; ++step) {
    next(step);
    add_step<Tile, Parts>(teacher, stage_of(step), diagonal);
  }
  block_barrier();  // shared memory is free

  // Rows behind the last have the inverse norm zero: their similarities and all that follows are zero.
  const float* const numbers = work.rows + image * kGramRowFields * work.patches;
  const auto number = [&](int field, int block, int row, int valid) {
    return row < valid ? load_global(numbers + int64_t(field) * work.patches + block * Tile + row) : 0.f;
  };
  float column_inverse[NT][2], column_inverse_teacher[NT][2], column_along[NT][2] = {};
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int column = Layout::column() + accumulator_column(n, q);
      column_inverse[n][q] = number(kStudentInverse, column_block, column, valid_columns);
      column_inverse_teacher[n][q] = number(kTeacherInverse, column_block, column, valid_columns);
    }
  }
  // Behind the place of F: sums of each warp, for t of the rows and of the columns, and losses.
  const uint32_t row_sums = shared + uint32_t(Stages::kStagedBytes);
  const uint32_t column_sums = row_sums + uint32_t(Layout::kAcross * Tile * 4);
  const uint32_t losses = column_sums + uint32_t(Layout::kDown * Tile * 4);
  float loss = 0.f;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Layout::row() + 16 * m + accumulator_row(2 * half);
      const float row_inverse = number(kStudentInverse, row_block, row, valid_rows);
      const float row_inverse_teacher = number(kTeacherInverse, row_block, row, valid_rows);
      // Of a row with itself: without the rounding of the norms.
      const float self = diagonal ? number(kStudentSelf, row_block, row, valid_rows) : 0.f;
      const float self_teacher = diagonal ? number(kTeacherSelf, row_block, row, valid_rows) : 0.f;
      float squares = 0.f, row_along = 0.f;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          float& entry = student[m][n][2 * half + q];
          float s = entry * row_inverse * column_inverse[n][q];
          float t = teacher[m][n][2 * half + q] * row_inverse_teacher * column_inverse_teacher[n][q];
          if (diagonal && row == Layout::column() + accumulator_column(n, q)) s = self, t = self_teacher;
          const float kept = s < work.lowest_student ? work.lowest_student : s;
          const float difference = kept - (t < work.lowest_teacher ? work.lowest_teacher : t);
          squares = fmaf(difference, difference, squares);
          const float passed = s < work.lowest_student ? 0.f : difference;
          row_along = fmaf(passed, s, row_along);
          column_along[n][q] = fmaf(passed, s, column_along[n][q]);
          entry = passed * (0x1p14f * row_inverse) * (0x1p28f * column_inverse[n][q]);
        }
      }
      loss += squares;
      row_along = sum_of_row(row_along);
      if ((lane_index() & 3) == 0) {
        store_shared(row_sums + uint32_t(4 * (warp_index() / Layout::kDown * Tile + row)), row_along);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const float sum = sum_of_column(column_along[n][q]);
      if (lane_index() < 4) {
        const int place = warp_index() % Layout::kDown * Tile + Layout::column() + accumulator_column(n, q);
        store_shared(column_sums + uint32_t(4 * place), sum);
      }
    }
  }
  loss = warp_reduce<Add>(loss);
  if (lane_index() == 0) store_shared(losses + uint32_t(4 * warp_index()), loss);
  if (work.entries) stage_entries<Tile, Parts>(student, shared);
  block_barrier();

  if (thread_index() == 0) {
    loss = 0.f;
#pragma unroll
    for (int warp = 0; warp < Layout::kThreads / 32; ++warp) loss += load_shared<float>(losses + uint32_t(4 * warp));
    store_global(work.losses + image * work.tiles + index, diagonal ? loss : 2.f * loss);
  }
  if (!work.entries) return;
  if (thread_index() < Tile) {
    float across = 0.f, down = 0.f;
#pragma unroll
    for (int i = 0; i < Layout::kAcross; ++i) {
      across += load_shared<float>(row_sums + uint32_t(4 * (i * Tile + thread_index())));
    }
#pragma unroll
    for (int i = 0; i < Layout::kDown; ++i) {
      down += load_shared<float>(column_sums + uint32_t(4 * (i * Tile + thread_index())));
    }
    float* along = work.along + image * work.blocks * work.blocks * Tile + thread_index();
    store_global(along + (int64_t(column_block) * work.blocks + row_block) * Tile, across);
    if (!diagonal) store_global(along + (int64_t(row_block) * work.blocks + column_block) * Tile, down);
  }
  store_entries<Tile, Parts>(work.entries + (image * work.tiles + index) * Parts * Tile * Tile, shared);
}

}  // namespace dinov3_ext
