// Sinkhorn-Knopp potentials, split where ranks exchange. Torch-free: this header is all that the kernels and the
// binding share.
//
// With s[b, k] = logits[b, k] / temperature and natural-log potentials rows[b], columns[k]:
//   1. column sums: maxima[k] = max_b s[b, k],  sums[k] = sum_b exp(s[b, k] - maxima[k])     (ranks: max, then sum)
//   2. finish:      columns[k] = shift[k] - log sums[k];  0 where sums[k] = 0 (no row, or only -inf)
//   3. row sums:    rows[b] = -log sum_k exp(s[b, k] + columns[k]),  and, for the next round,
//                   sums[k] = sum_b exp(s[b, k] + columns[k] + rows[b])                       (ranks: sum)
// In step 3 no maximum over the samples is needed: after step 2 each column sums to one, so after step 3 its largest
// entry is at least 1 / (rows K), far from underflow.
//
// Where no other rank is asked, a whole iteration is one step that reads the logits once: the finished columns of a few
// neighbouring prototypes give these prototypes' share of the row sums at once.
//
// Sums are fp32 in an order that depends on the shape alone: not on threads, not on the GPU. Offsets are int64.
#pragma once

#include <cstdint>

#include "core/element.h"
#include "core/inverse.h"
#include "core/parallel.h"

namespace dinov3_ext {

struct SinkhornLogits {
  const void* data;    // (rows, prototypes), the last dimension contiguous
  Element element;     // type of `data`
  int64_t rows;        // >= 0
  int64_t prototypes;  // >= 1
  int64_t row_stride;  // in elements, >= prototypes (any where rows <= 1)
  float scale;         // log2(e) / temperature
  Inverse inverse;     // 1 / temperature
};

struct SinkhornColumnSums {
  SinkhornLogits logits;
  float* partial;  // workspace (2, splits, prototypes); CUDA only, null on the CPU
  float* maxima;   // out (prototypes,): -inf without rows
  float* sums;     // out (prototypes,)
};

struct SinkhornFinish {
  const float* sums;   // (prototypes,)
  const float* shift;  // (prototypes,) natural logarithms: minus the maxima, or the columns so far
  float* columns;      // out (prototypes,)
  int64_t prototypes;
};

struct SinkhornRowSums {
  SinkhornLogits logits;
  const float*
      previous;          // (rows,) row potentials before, a good guess of the result: on the CPU no maximum is searched
  const float* columns;  // (prototypes,)
  float* row_partial;    // workspace (2, ranges, rows); CUDA only, null on the CPU
  float* partial;        // workspace (splits, prototypes), or null: no column sums wanted
  float* rows;           // out (rows,)
  float* sums;           // out (prototypes,), or null together with `partial`
};

struct SinkhornIteration {
  SinkhornLogits logits;
  bool first;      // nothing is known: rows count as zero
  float* partial;  // workspace of sinkhorn_shares_cpu or _cuda floats
  float* rows;     // (rows,) in unless `first`; out
  float* columns;  // (prototypes,) in unless `first`: of the iteration before; out
};

// Rows for which a CPU takes the iteration in one step; more are faster row by row (a page of the logits each): 4915 x
// 8192 bf16 60 against 120 ms of one core.
inline constexpr int64_t kSinkhornMostRowsCpu = 1024;

int64_t sinkhorn_shares_cpu(const SinkhornLogits& logits);
void sinkhorn_iteration_cpu(const SinkhornIteration& args, ParallelFor parallel_for);
int64_t sinkhorn_splits_cpu(int64_t rows);
void sinkhorn_column_sums_cpu(const SinkhornColumnSums& args, ParallelFor parallel_for);
void sinkhorn_finish_cpu(const SinkhornFinish& args, ParallelFor parallel_for);
void sinkhorn_row_sums_cpu(const SinkhornRowSums& args, ParallelFor parallel_for);

// Launchers: enqueue on `stream` (a cudaStream_t), return a cudaError_t as int, never wait.
int64_t sinkhorn_shares_cuda(const SinkhornLogits& logits);
int sinkhorn_iteration_cuda(const SinkhornIteration& args, void* stream);
int sinkhorn_column_sums_cuda(const SinkhornColumnSums& args, void* stream);
int sinkhorn_finish_cuda(const SinkhornFinish& args, void* stream);
int sinkhorn_row_sums_cuda(const SinkhornRowSums& args, void* stream);

}  // namespace dinov3_ext
