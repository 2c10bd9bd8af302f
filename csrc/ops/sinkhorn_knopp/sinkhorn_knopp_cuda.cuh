// Sinkhorn-Knopp kernels, limited by memory.
//
// Traffic, three iterations, 16 bits. One rank alone: a block takes all rows of some columns, so that it knows these
// columns' potentials without asking anybody and adds its share to the rows while the logits lie in shared memory:
// three readings, 6 bytes a logit, 4 a column, and 16 a row and tile for the shares. Ranks that exchange in between:
// six readings (columns, then rows and next columns twice, then rows), 12 bytes, or 2 from memory and 10 from the L2
// cache where they fit it (128 x 65536: 17 MB). Beside them 72 bytes per column for the vectors of K numbers, and
// partial results of 8 or 16 bytes per column for every split of at least 128 rows.
//
// Column kernels: a warp takes 32 N neighbouring columns (512 bytes of a row) and every eighth row of its block's
// split, so that 65536 columns alone make 256 blocks, and few rows need no splits. Row kernel: a block takes kRows rows
// at once, because each reading of the column potentials from L2 (4 bytes a column) then serves kRows logits of 2
// bytes; with one row at a time that, not memory, would be the limit (6 bytes a logit through L2 instead of 3). Partial
// results go to a workspace and are added in the order of their index: no atomics.
#pragma once

#include <cmath>

#include "core/block_reduce.cuh"
#include "core/element.cuh"
#include "core/inverse.cuh"
#include "core/log_sum.cuh"
#include "core/primitives.cuh"
#include "ops/sinkhorn_knopp/sinkhorn_knopp.h"
#include "ops/sinkhorn_knopp/sinkhorn_knopp_plan.h"

namespace dinov3_ext {
namespace sinkhorn {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr int kThreads = kSinkhornThreads;
inline constexpr int kWarps = kSinkhornWarps;
inline constexpr int kRows = kSinkhornRows;
inline constexpr int kAtOnce = 4;  // rows whose loads a column kernel's warp has under way

template <Element E>
__device__ __forceinline__ const typename Storage<E>::Type* row_of(const SinkhornLogits& logits, int64_t row) {
  return static_cast<const typename Storage<E>::Type*>(logits.data) + row * logits.row_stride;
}

// Calls visit(x, valid) for this warp's rows of the block's split, kAtOnce at a time: x[j][i] is column k + i of the
// j-th row, and where not valid[j] there is no such row. `extra(row)` is read along with the row, into more[j].
template <Element E, int N, class Extra, class Visit>
__device__ __forceinline__ void visit_rows(const SinkhornLogits& logits, int64_t rows_of_split, int64_t k, Extra extra,
                                           Visit visit) {
  const int64_t first = block_index<1>() * rows_of_split, behind = first + rows_of_split;
  const int64_t last = behind < logits.rows ? behind : logits.rows;
  for (int64_t row = first + warp_index(); row < last; row += kAtOnce * kWarps) {
    typename Packed<E, N>::Type packed[kAtOnce];
    float more[kAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (row + j * kWarps < last) {
        packed[j] = load_packed<E, N>(row_of<E>(logits, row + j * kWarps) + k);
        more[j] = extra(row + j * kWarps);
      }
    }
    float x[kAtOnce][N];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (row + j * kWarps < last) {
        widen_packed<E, N>(packed[j], x[j]);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) x[j][i] = -INFINITY;  // adds nothing
      }
    }
    visit(x, more);
  }
}

// Natural logarithm; -inf without rows, or with -inf alone.
__device__ __forceinline__ float natural_maximum(const LogSum& column, const Inverse& temperature) {
  return column.nothing() ? -INFINITY : divide_add(column.maximum, temperature, 0.f, 0.f);
}

// Shared memory of the column kernels: float arrays of kWarps x Lanes N, one float for every column a warp holds.
template <int N, int Lanes = 32>
struct ColumnScratch {
  static constexpr int kColumns = Lanes * N;

  // 16-byte chunks change places in pairs, so that the eight lanes of one phase of a 16-byte store, 32 bytes apart,
  // meet all banks.
  __device__ __forceinline__ uint32_t address(int array, int warp, int column) const {
    const int chunk = column >> 2, moved = chunk ^ ((chunk >> 3) & 1);
    return shared_base() + 4u * uint32_t((array * kWarps + warp) * kColumns + moved * 4 + (column & 3));
  }
  __device__ __forceinline__ void store(int array, const float (&values)[N]) const {
    if constexpr (N == 1) {
      store_shared(address(array, warp_index(), lane_index()), values[0]);
    } else {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        store_shared(address(array, warp_index(), lane_index() * N + i),
                     float4{values[i], values[i + 1], values[i + 2], values[i + 3]});
      }
    }
  }
  __device__ __forceinline__ float load(int array, int warp, int column) const {
    return load_shared<float>(address(array, warp, column));
  }
  // The N columns of a lane, of the first warp's.
  __device__ __forceinline__ void load_own(int array, int lane, float (&values)[N]) const {
    if constexpr (N == 1) {
      values[0] = load(array, 0, lane);
    } else {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const float4 four = load_shared<float4>(address(array, 0, lane * N + i));
        values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
      }
    }
  }
};

// grid (columns / (32 N), splits): maximum and sum over a split's rows of 2^(scale x), a column's in one thread of each
// warp. Writes the result where there is one split, else partial (2, splits, prototypes): maxima, then sums.
// Shared memory: two floats for each of kWarps * 32 N columns.
template <Element E, int N>
__global__ void __launch_bounds__(kThreads) column_partial(SinkhornColumnSums args, int64_t rows_of_split) {
  const SinkhornLogits& logits = args.logits;
  const int64_t k = (block_index<0>() * 32 + lane_index()) * N;
  LogSum state[N];
  if (k < logits.prototypes) {
    visit_rows<E, N>(
        logits, rows_of_split, k, [](int64_t) { return 0.f; },
        [&](const float(&x)[kAtOnce][N], const float(&)[kAtOnce]) {
#pragma unroll
          for (int i = 0; i < N; ++i) {
            float column[kAtOnce];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) column[j] = x[j][i];
            state[i].add(column, logits.scale);
          }
        });
  }
  const ColumnScratch<N> scratch;
  float maximum[N], sum[N];
#pragma unroll
  for (int i = 0; i < N; ++i) maximum[i] = state[i].maximum, sum[i] = state[i].sum;
  scratch.store(0, maximum);
  scratch.store(1, sum);
  block_barrier();
  const bool alone = grid_size<1>() == 1;
  float* maxima = alone ? args.maxima : args.partial + block_index<1>() * logits.prototypes;
  float* sums = alone ? args.sums : args.partial + (grid_size<1>() + block_index<1>()) * logits.prototypes;
  const int column = thread_index();
  const int64_t index = block_index<0>() * scratch.kColumns + column;
  if (column >= scratch.kColumns || index >= logits.prototypes) return;
  LogSum total;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    LogSum one;
    one.maximum = scratch.load(0, warp, column), one.sum = scratch.load(1, warp, column);
    total.merge(one, logits.scale);
  }
  store_global(maxima + index, alone ? natural_maximum(total, logits.inverse) : total.maximum);
  store_global(sums + index, total.sum);
}

// One thread per column: the splits' pairs in order.
__global__ void __launch_bounds__(kThreads) column_combine(SinkhornColumnSums args, int64_t splits) {
  const int64_t prototypes = args.logits.prototypes;
  const int64_t k = block_index<0>() * kThreads + thread_index();
  if (k >= prototypes) return;
  LogSum total;
  for (int64_t split = 0; split < splits; ++split) {
    LogSum one;
    one.maximum = load_global(args.partial + split * prototypes + k);
    one.sum = load_global(args.partial + (splits + split) * prototypes + k);
    total.merge(one, args.logits.scale);
  }
  store_global(args.maxima + k, natural_maximum(total, args.logits.inverse));
  store_global(args.sums + k, total.sum);
}

__global__ void __launch_bounds__(kThreads) finish(SinkhornFinish args) {
  const int64_t k = block_index<0>() * kThreads + thread_index();
  if (k >= args.prototypes) return;
  const float sum = load_global(args.sums + k);
  store_global(args.columns + k, sum == 0.f ? 0.f : load_global(args.shift + k) - logf(sum));
}

// Blocks: (kRows rows, range of columns). A thread takes N columns (16 bytes) of all its rows, then those kThreads N
// further on. Writes the potentials where there is one range, else row_partial (2, ranges, rows): maxima, then sums.
// Shared memory: two floats for each of kRows * kWarps.
template <Element E, int N>
__global__ void __launch_bounds__(kThreads)
    row_partial(SinkhornRowSums args, int64_t ranges, int64_t columns_of_range) {
  const SinkhornLogits& logits = args.logits;
  const int64_t first_row = uint32_t(block_index<0>()) / uint32_t(ranges) * int64_t(kRows);
  const int64_t range = uint32_t(block_index<0>()) % uint32_t(ranges);
  const int64_t rows = logits.rows - first_row;
  const auto* from = row_of<E>(logits, first_row);
  LogSum state[kRows];
  const int64_t first = range * columns_of_range, behind = first + columns_of_range;
  const int64_t last = behind < logits.prototypes ? behind : logits.prototypes;
  for (int64_t k = first + int64_t(thread_index()) * N; k < last; k += kThreads * N) {
    typename Packed<E, N>::Type packed[kRows];
    float column[N];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < rows) packed[r] = load_packed<E, N>(from + r * logits.row_stride + k);
    }
    load_floats<N>(args.columns + k, column);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < rows) {
        float x[N];
        widen_packed<E, N>(packed[r], x);
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = divide_add(x[i], logits.inverse, column[i], 0.f);
        state[r].add(x, kLog2E);
      }
    }
  }
  const auto place = [](int r, int number, int warp) {
    return shared_base() + 4u * uint32_t((warp * kRows + r) * 2 + number);
  };
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    state[r].reduce_over_warp(kLog2E);
    if (lane_index() == 0) {
      store_shared(place(r, 0, warp_index()), state[r].maximum);
      store_shared(place(r, 1, warp_index()), state[r].sum);
    }
  }
  block_barrier();
  const int r = thread_index();
  if (r >= kRows || r >= rows) return;
  LogSum total;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    LogSum one;
    one.maximum = load_shared<float>(place(r, 0, warp)), one.sum = load_shared<float>(place(r, 1, warp));
    total.merge(one, kLog2E);
  }
  const int64_t row = first_row + r;
  if (ranges == 1) {
    store_global(args.rows + row, -total.maximum - logf(total.sum));
  } else {
    store_global(args.row_partial + range * logits.rows + row, total.maximum);
    store_global(args.row_partial + (ranges + range) * logits.rows + row, total.sum);
  }
}

// One thread per row: the ranges' pairs in order.
__global__ void __launch_bounds__(kThreads) row_combine(SinkhornRowSums args, int64_t ranges) {
  const int64_t rows = args.logits.rows, row = block_index<0>() * kThreads + thread_index();
  if (row >= rows) return;
  LogSum total;
  for (int64_t range = 0; range < ranges; ++range) {
    LogSum one;
    one.maximum = load_global(args.row_partial + range * rows + row);
    one.sum = load_global(args.row_partial + (ranges + range) * rows + row);
    total.merge(one, kLog2E);
  }
  store_global(args.rows + row, -total.maximum - logf(total.sum));
}

// Grid and ownership as in column_partial: sums of the finished rows, into the result or partial (splits, prototypes).
// Shared memory: a float for each of kWarps * 32 N columns.
template <Element E, int N>
__global__ void __launch_bounds__(kThreads) next_partial(SinkhornRowSums args, int64_t rows_of_split) {
  const SinkhornLogits& logits = args.logits;
  const int64_t k = (block_index<0>() * 32 + lane_index()) * N;
  float sum[N] = {};
  if (k < logits.prototypes) {
    float column[N];
    load_floats<N>(args.columns + k, column);
    visit_rows<E, N>(
        logits, rows_of_split, k, [&](int64_t row) { return load_global(args.rows + row); },
        [&](const float(&x)[kAtOnce][N], const float(&potential)[kAtOnce]) {
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
              sum[i] += exp2_approx(divide_add(x[j][i], logits.inverse, column[i], potential[j]) * kLog2E);
            }
          }
        });
  }
  const ColumnScratch<N> scratch;
  scratch.store(0, sum);
  block_barrier();
  const int column = thread_index();
  const int64_t index = block_index<0>() * scratch.kColumns + column;
  if (column >= scratch.kColumns || index >= logits.prototypes) return;
  float total = 0.f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += scratch.load(0, warp, column);
  store_global((grid_size<1>() == 1 ? args.sums : args.partial + block_index<1>() * logits.prototypes) + index, total);
}

__global__ void __launch_bounds__(kThreads) next_combine(SinkhornRowSums args, int64_t splits) {
  const int64_t prototypes = args.logits.prototypes, k = block_index<0>() * kThreads + thread_index();
  if (k >= prototypes) return;
  float sum = 0.f;
  for (int64_t split = 0; split < splits; ++split) sum += load_global(args.partial + split * prototypes + k);
  store_global(args.sums + k, sum);
}

// ---- one rank alone: an iteration in one reading ----

// grid (tiles): all rows of Lanes N columns. Writes the columns' potentials, -log sum_b exp(x / temperature + rows[b]),
// and each row's share of the next sums to partial (rows, tiles): maximum and sum of exp(x / temperature + columns[k]).
// A thread meets the same elements in both parts: no barrier for those in shared memory.
// Shared memory: two floats for each of kWarps Lanes N columns, one for each column, and with Kept the elements.
template <Element E, int N, int Lanes, bool Kept>
__global__ void __launch_bounds__(kThreads, 2) iteration_tile(SinkhornIteration args) {
  using Elements = typename Packed<E, N>::Type;
  constexpr int kTogether = 32 / Lanes, kGroups = kWarps * kTogether;  // rows of a warp, of a block
  const SinkhornLogits& logits = args.logits;
  const ColumnScratch<N, Lanes> scratch;
  constexpr int kColumns = Lanes * N;
  const uint32_t kept = shared_base() + (2 * kWarps + 1) * kColumns * 4;
  // Through a shuffle, so that the compiler, too, knows the warp's number to be the same for all lanes.
  const int warp = shuffle(warp_index(), 0), lane = lane_index() % Lanes;
  const int64_t k = block_index<0>() * kColumns + lane * N;
  const int64_t own = warp * kTogether + lane_index() / Lanes;
  const bool inside = k < logits.prototypes;
  const auto place = [&](int64_t row) { return kept + uint32_t((row * Lanes + lane) * int64_t(sizeof(Elements))); };

  LogSum state[N];
  for (int64_t row = own; inside && row < logits.rows; row += kAtOnce * kGroups) {
    Elements packed[kAtOnce];
    float potential[kAtOnce], x[kAtOnce][N];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t at = row + j * kGroups;
      if (at < logits.rows) {
        packed[j] = load_packed<E, N>(row_of<E>(logits, at) + k);
        potential[j] = args.first ? 0.f : load_global(args.rows + at);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t at = row + j * kGroups;
      if (at < logits.rows) {
        if constexpr (Kept) store_shared(place(at), packed[j]);
        widen_packed<E, N>(packed[j], x[j]);
#pragma unroll
        for (int i = 0; i < N; ++i) x[j][i] = divide_add(x[j][i], logits.inverse, potential[j], 0.f);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) x[j][i] = -INFINITY;  // adds nothing
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float column[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) column[j] = x[j][i];
      state[i].add(column, kLog2E);
    }
  }
  float maximum[N], sum[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int mask = Lanes; mask < 32; mask *= 2) {
      LogSum other;
      other.maximum = shuffle_xor(state[i].maximum, mask), other.sum = shuffle_xor(state[i].sum, mask);
      state[i].merge(other, kLog2E);
    }
    maximum[i] = state[i].maximum, sum[i] = state[i].sum;
  }
  if (lane_index() < Lanes) {
    scratch.store(0, maximum);
    scratch.store(1, sum);
  }
  block_barrier();
  if (thread_index() < kColumns) {
    const int column = thread_index();
    const int64_t index = block_index<0>() * kColumns + column;
    LogSum total;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      LogSum one;
      one.maximum = scratch.load(0, w, column), one.sum = scratch.load(1, w, column);
      total.merge(one, kLog2E);
    }
    const float potential = total.sum == 0.f ? 0.f : -total.maximum - logf(total.sum);
    if (index < logits.prototypes) store_global(args.columns + index, potential);
    store_shared(scratch.address(2, 0, column), potential);
  }
  block_barrier();

  float column[N];
  scratch.load_own(2, lane, column);
  for (int64_t first = warp * kTogether; first < logits.rows; first += kAtOnce * kGroups) {
    const int64_t row = first + lane_index() / Lanes;
    LogSum share[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t at = row + j * kGroups;
      if (inside && at < logits.rows) {
        float x[N];
        if constexpr (Kept) {
          widen_packed<E, N>(load_shared<Elements>(place(at)), x);
        } else {
          load_elements<E, N>(row_of<E>(logits, at) + k, x);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = divide_add(x[i], logits.inverse, column[i], 0.f);
        share[j].add(x, kLog2E);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      share[j].template reduce_over_lanes<Lanes>(kLog2E);
      const int64_t at = row + j * kGroups;
      if (lane == 0 && at < logits.rows) {
        store_global(reinterpret_cast<float2*>(args.partial) + at * grid_size<0>() + block_index<0>(),
                     float2{share[j].maximum, share[j].sum});
      }
    }
  }
}

// A warp for each row: the tiles' shares, in an order that depends on their number alone.
__global__ void __launch_bounds__(kThreads) iteration_rows(SinkhornIteration args, int64_t tiles) {
  const int64_t row = block_index<0>() * kWarps + shuffle(warp_index(), 0);
  if (row >= args.logits.rows) return;
  const float2* shares = reinterpret_cast<const float2*>(args.partial) + row * tiles;
  LogSum total;
  for (int64_t tile = lane_index(); tile < tiles; tile += 32) {
    const float2 share = load_global(shares + tile);
    LogSum one;
    one.maximum = share.x, one.sum = share.y;
    total.merge(one, kLog2E);
  }
  total.reduce_over_warp(kLog2E);
  if (lane_index() == 0) store_global(args.rows + row, -total.maximum - logf(total.sum));
}

}  // namespace sinkhorn
}  // namespace dinov3_ext
