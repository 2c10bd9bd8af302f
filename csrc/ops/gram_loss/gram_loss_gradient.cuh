// The student's gradient: F times the packed features, then the share that the normalisation takes back.
//
// A block of 8 warps owns 128 rows x 128 columns of one image's gradient (4 warps: 64 x 64) and walks the rows of the
// contraction in steps of 32: F from the lower triangle as it is, from above by transposed matrix loads of its mirror
// image, so that F is stored once. Per step 8 KB of F and 8 KB of features per part. F (N^2 bytes per part) is read
// once per 128 columns and the features once per 128 rows, both from L2 where the chunk fits; the gradient is written
// once.
#pragma once

#include "ops/gram_loss/gram_loss_cuda.cuh"

namespace dinov3_ext {

template <int Tile, int Parts>
struct GramGradient {
  static constexpr int kStages = Parts == 2 ? 3 : 4;
  static constexpr int kOperandBytes = Tile * kGramDepth * 2;
  static constexpr int kStageBytes = 2 * Parts * kOperandBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + Tile * 4;  // and a number per row
};

// Starts copying step `step`: Tile x 32 entries of F and 32 x Tile features of the student.
template <int Tile, int Parts>
__device__ __forceinline__ void start_gradient_step(const GramWork& work, int64_t image, int row_block,
                                                    int first_column, int step, uint32_t stage) {
  constexpr int kThreads = GramTile<Tile>::kThreads, kBytes = GramGradient<Tile, Parts>::kOperandBytes;
  const int first = step * kGramDepth, block = first / Tile;
  const bool above = block > row_block;
  const int place = above ? triangle(block) + row_block : triangle(row_block) + block;
  const uint16_t* entries = work.entries + (image * work.tiles + place) * Parts * Tile * Tile;
  const uint16_t* features = work.student + (image * Parts * work.patches + first) * work.packed_width + first_column;
#pragma unroll
  for (int part = 0; part < Parts; ++part) {
    const uint16_t* from = entries + part * Tile * Tile;
    const uint32_t left = stage + uint32_t(part * kBytes);
    if (above) {
      copy_tile_async<kGramDepth, kThreads>(dinov3_ext::Tile<Tile>{left}, from + first % Tile * Tile, Tile, kGramDepth);
    } else {
      copy_tile_async<Tile, kThreads>(dinov3_ext::Tile<kGramDepth>{left}, from + first % Tile, Tile, Tile);
    }
    copy_tile_async<kGramDepth, kThreads>(dinov3_ext::Tile<Tile>{stage + uint32_t((Parts + part) * kBytes)},
                                          features + int64_t(part) * work.patches * work.packed_width,
                                          work.packed_width, work.patches - first);
  }
}

// Adds one step's products. Above the diagonal the step holds F transposed: 32 x Tile.
template <int Tile, int Parts, bool Above, int MT, int NT>
__device__ __forceinline__ void add_gradient_step(float (&sums)[MT][NT][4], uint32_t stage) {
  using Layout = GramTile<Tile>;
  using Entries = dinov3_ext::Tile<Above ? Tile : kGramDepth>;
  using Features = dinov3_ext::Tile<Tile>;
  constexpr uint32_t kBytes = GramGradient<Tile, Parts>::kOperandBytes;
  const uint32_t right = stage + Parts * kBytes;
#pragma unroll
  for (int k = 0; k < kGramDepth; k += 32 / Parts) {
    const int second = Parts == 2 ? k : k + 16;  // the low part, or the next 16 terms
    const uint32_t low = Parts == 2 ? kBytes : 0;
    uint32_t b[2][NT / 2][4];
    load_right_columns<NT>(b[0], Features{right}, k, Layout::column());
    load_right_columns<NT>(b[1], Features{right + low}, second, Layout::column());
    // 16 rows on, a tile's addresses are 16 rows' bytes on.
    const uint32_t first = left_address(Entries{stage}, Layout::row(), k, lane_index());
    const uint32_t other = left_address(Entries{stage + low}, Layout::row(), second, lane_index());
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      uint32_t a[2][4];
      if constexpr (Above) {
        const int row = Layout::row() + 16 * m;
        load_matrices_transposed(a[0], left_address_transposed(Entries{stage}, k, row, lane_index()));
        load_matrices_transposed(a[1], left_address_transposed(Entries{stage + low}, second, row, lane_index()));
      } else {
        load_matrices(a[0], first + uint32_t(16 * m * Entries::kRowBytes));
        load_matrices(a[1], other + uint32_t(16 * m * Entries::kRowBytes));
      }
      add_products<Parts>(sums[m], a, b);
    }
  }
}

// Two neighbouring columns of the gradient; pairs are aligned where the width is even.
__device__ __forceinline__ void store_pair(const GramWork& work, int64_t index, float first, float second, bool both) {
  if (work.grad_is_bfloat16) {
    uint16_t* to = static_cast<uint16_t*>(work.grad) + index;
    if (both && work.width % 2 == 0) {
      store_global(reinterpret_cast<uint32_t*>(to), pack<Element::bfloat16>(first, second));
    } else {
      store_global(to, narrow<Element::bfloat16>(first));
      if (both) store_global(to + 1, narrow<Element::bfloat16>(second));
    }
  } else {
    float* to = static_cast<float*>(work.grad) + index;
    if (both && work.width % 2 == 0) {
      store_global(reinterpret_cast<float2*>(to), float2{first, second});
    } else {
      store_global(to, first);
      if (both) store_global(to + 1, second);
    }
  }
}

// grid (blocks of rows, blocks of columns, images)
template <int Tile, int Parts>
__global__ void __launch_bounds__(GramTile<Tile>::kThreads) gram_gradient(GramWork work) {
  using Layout = GramTile<Tile>;
  using Stages = GramGradient<Tile, Parts>;
  constexpr int MT = Layout::MT, NT = Layout::NT;
  const int row_block = int(block_index<0>()), first_column = int(block_index<1>()) * Tile;
  const int64_t image = block_index<2>();
  const uint32_t shared = shared_base();

  const int steps = (work.patches + kGramDepth - 1) / kGramDepth;
  const auto stage_of = [&](int step) { return shared + uint32_t(step % Stages::kStages * Stages::kStageBytes); };
  const auto start = [&](int step) {
    if (step < steps) {
      start_gradient_step<Tile, Parts>(work, image, row_block, first_column, step, stage_of(step));
    }
    copy_async_commit();
  };
#pragma unroll
  for (int step = 0; step < Stages::kStages - 1; ++step) start(step);

  // Each row's t times what x' takes of it; the sums over tile columns that t consists of, in their order.
  const float* numbers = work.rows + image * kGramRowFields * work.patches;
  const uint32_t alongs = shared + uint32_t(Stages::kStages * Stages::kStageBytes);
  if (thread_index() < Tile) {
    const int row = row_block * Tile + thread_index();
    float sum = 0.f;
    if (row < work.patches) {
      const float* along = work.along + image * work.blocks * work.blocks * Tile + row;
      for (int64_t block = 0; block < work.blocks; ++block) sum += load_global(along + block * work.blocks * Tile);
      sum *= load_global(numbers + kStudentAlong * work.patches + row);
    }
    store_shared(alongs + uint32_t(4 * thread_index()), sum);  // read behind the loop's barriers
  }

  float sums[MT][NT][4] = {};
  const auto next = [&](int step) {
    copy_async_wait<Stages::kStages - 2>();
    block_barrier();  // step `step` is there for all, and none still reads step `step - 1`, whose place is filled next
    start(step + Stages::kStages - 1);
  };
  const int below = (row_block + 1) * (Tile / kGramDepth);  // steps up to the diagonal block
  const int first_above = below < steps ? below : steps;
#pragma unroll 1
  for (int step = 0; step < first_above; ++step) {
    next(step);
    add_gradient_step<Tile, Parts, false>(sums, stage_of(step));
  }
#pragma unroll 1
  for (int step = first_above; step < steps; ++step) {
    next(step);
    add_gradient_step<Tile, Parts, true>(sums, stage_of(step));
  }

  const uint16_t* packed = work.student + image * Parts * work.patches * work.packed_width;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row_in_tile = Layout::row() + 16 * m + accumulator_row(2 * half);
      const int row = row_block * Tile + row_in_tile;
      if (row >= work.patches) continue;
      const float along = load_shared<float>(alongs + uint32_t(4 * row_in_tile));
      const float scale = work.coefficient * load_global(numbers + kStudentScale * work.patches + row);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int column = first_column + Layout::column() + accumulator_column(n, 0);
        if (column >= work.width) continue;
        const uint16_t* place = packed + int64_t(row) * work.packed_width + column;
        float2 x = unpack<kGramElement>(load_global(reinterpret_cast<const uint32_t*>(place)));
        if constexpr (Parts == 2) {
          const float2 low = unpack<kGramElement>(
              load_global(reinterpret_cast<const uint32_t*>(place + int64_t(work.patches) * work.packed_width)));
          x.x += low.x, x.y += low.y;
        }
        store_pair(work, (image * work.patches + row) * work.width + column,
                   scale * fmaf(-along, x.x, sums[m][n][2 * half]), scale * fmaf(-along, x.y, sums[m][n][2 * half + 1]),
                   column + 1 < work.width);
      }
    }
  }
}

}  // namespace dinov3_ext
