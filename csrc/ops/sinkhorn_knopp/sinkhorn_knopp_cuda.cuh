// Sinkhorn-Knopp kernels. All are limited by memory: each thread reads 16 bytes of logits at a time where the rows are
// so aligned. Partial results go to a workspace and are added in the order of their index: no atomics.
#pragma once

#include <cmath>

#include "core/block_reduce.cuh"
#include "core/element.cuh"
#include "core/primitives.cuh"
#include "ops/sinkhorn_knopp/sinkhorn_knopp.h"

namespace dinov3_ext {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr int kColumnThreads = 256;
inline constexpr int kRowThreads = 512;

template <Element E>
__device__ __forceinline__ const typename Storage<E>::Type* row_of(const SinkhornLogits& logits, int64_t row) {
  return static_cast<const typename Storage<E>::Type*>(logits.data) + row * logits.row_stride;
}

// grid (prototypes / (N * kColumnThreads), splits). A thread owns N columns and every row of its split: running
// maximum (units of log2) and sum. partial: (2, splits, prototypes).
template <Element E, int N>
__global__ void __launch_bounds__(kColumnThreads) column_partial(SinkhornColumnSums args, int64_t rows_of_split) {
  const SinkhornLogits& logits = args.logits;
  const int64_t k = (block_index<0>() * kColumnThreads + thread_index()) * N;
  if (k >= logits.prototypes) return;
  const int64_t first = block_index<1>() * rows_of_split, last = min(first + rows_of_split, logits.rows);
  float maximum[N], sum[N];
#pragma unroll
  for (int i = 0; i < N; ++i) maximum[i] = -INFINITY, sum[i] = 0.f;
#pragma unroll 4
  for (int64_t row = first; row < last; ++row) {
    float x[N];
    load_elements<E, N>(row_of<E>(logits, row) + k, x);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float s = x[i] * logits.scale;
      // A NaN logit must reach the sum, so the comparison, not fmaxf, decides.
      const float highest = s <= maximum[i] ? maximum[i] : s;
      const float shift = highest == -INFINITY ? 0.f : highest;  // -inf - -inf would be NaN
      sum[i] = sum[i] * exp2_approx(maximum[i] - shift) + exp2_approx(s - shift);
      maximum[i] = highest;
    }
  }
  float* maxima = args.partial + block_index<1>() * logits.prototypes + k;
  float* sums = maxima + grid_size<1>() * logits.prototypes;
#pragma unroll
  for (int i = 0; i < N; ++i) maxima[i] = maximum[i], sums[i] = sum[i];
}

// One thread per column: the splits' pairs in order. No splits (no rows): (-inf, 0).
__global__ void __launch_bounds__(kColumnThreads) column_combine(SinkhornColumnSums args, int64_t splits) {
  const int64_t prototypes = args.logits.prototypes;
  const int64_t k = block_index<0>() * kColumnThreads + thread_index();
  if (k >= prototypes) return;
  float maximum = -INFINITY, sum = 0.f;
  for (int64_t split = 0; split < splits; ++split) {
    const float m = args.partial[split * prototypes + k], s = args.partial[(splits + split) * prototypes + k];
    const float highest = m <= maximum ? maximum : m;
    const float shift = highest == -INFINITY ? 0.f : highest;
    sum = sum * exp2_approx(maximum - shift) + s * exp2_approx(m - shift);
    maximum = highest;
  }
  args.maxima[k] = maximum * kLn2;
  args.sums[k] = sum;
}

__global__ void __launch_bounds__(kColumnThreads) finish(SinkhornFinish args) {
  const int64_t k = block_index<0>() * kColumnThreads + thread_index();
  if (k < args.prototypes) args.columns[k] = args.sums[k] == 0.f ? 0.f : args.shift[k] - logf(args.sums[k]);
}

// This thread's share of a row: N columns, then N columns kRowThreads * N further on. Operation::add takes each score
// (units of log2).
template <Element E, int N, class Visit>
__device__ __forceinline__ void visit_row(const SinkhornLogits& logits, int64_t row, const float* columns,
                                          Visit visit) {
  const auto* x = row_of<E>(logits, row);
#pragma unroll 2
  for (int64_t k = int64_t(thread_index()) * N; k < logits.prototypes; k += kRowThreads * N) {
    float value[N];
    load_elements<E, N>(x + k, value);
#pragma unroll
    for (int i = 0; i < N; ++i) visit(fmaf(value[i], logits.scale, columns[k + i] * kLog2E));
  }
}

// One block per row: its potential.
template <Element E, int N>
__global__ void __launch_bounds__(kRowThreads) row_potential(SinkhornRowSums args) {
  const int64_t row = block_index<0>();
  float shift = args.previous[row] * kLog2E;
  auto sum_with_shift = [&] {
    float sum = 0.f;
    visit_row<E, N>(args.logits, row, args.columns, [&](float score) { sum += exp2_approx(score + shift); });
    return block_reduce<Add, kRowThreads>(sum, shared_base());
  };
  float sum = sum_with_shift();
  if (!(sum >= 0x1p-60f && sum <= 0x1p60f)) {  // the same for the whole block
    float maximum = -INFINITY;
    visit_row<E, N>(args.logits, row, args.columns, [&](float score) { maximum = fmaxf(maximum, score); });
    maximum = block_reduce<Larger, kRowThreads>(maximum, shared_base());
    shift = maximum > -INFINITY ? -maximum : 0.f;
    sum = sum_with_shift();
  }
  if (thread_index() == 0) args.rows[row] = shift * kLn2 - logf(sum);
}

// Grid and ownership as in column_partial: sums of the finished rows. partial: (splits, prototypes).
template <Element E, int N>
__global__ void __launch_bounds__(kColumnThreads) next_partial(SinkhornRowSums args, int64_t rows_of_split) {
  const SinkhornLogits& logits = args.logits;
  const int64_t k = (block_index<0>() * kColumnThreads + thread_index()) * N;
  if (k >= logits.prototypes) return;
  const int64_t first = block_index<1>() * rows_of_split, last = min(first + rows_of_split, logits.rows);
  float sum[N], column[N];
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] = 0.f, column[i] = args.columns[k + i] * kLog2E;
#pragma unroll 4
  for (int64_t row = first; row < last; ++row) {
    const float potential = args.rows[row] * kLog2E;
    float x[N];
    load_elements<E, N>(row_of<E>(logits, row) + k, x);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += exp2_approx(fmaf(x[i], logits.scale, column[i]) + potential);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) args.partial[block_index<1>() * logits.prototypes + k + i] = sum[i];
}

__global__ void __launch_bounds__(kColumnThreads) next_combine(SinkhornRowSums args, int64_t splits) {
  const int64_t k = block_index<0>() * kColumnThreads + thread_index();
  if (k >= args.logits.prototypes) return;
  float sum = 0.f;
  for (int64_t split = 0; split < splits; ++split) sum += args.partial[split * args.logits.prototypes + k];
  args.sums[k] = sum;
}

}  // namespace dinov3_ext
