// Sinkhorn-Knopp for torch: checks, allocation, launch. One function per op; the tensor's device chooses the kernel.
#include <algorithm>
#include <tuple>

#include "binding/checks.h"
#include "binding/device.h"
#include "binding/ops.h"
#include "ops/sinkhorn_knopp/sinkhorn_knopp.h"
#include "ops/sinkhorn_knopp/sinkhorn_knopp_plan.h"

namespace dinov3_ext {
namespace {

constexpr double kLog2E = 1.4426950408889634;

SinkhornLogits check_logits(const char* op, const Tensor& logits, double temperature) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1, op, ": logits must be (rows, K) with K >= 1; got ",
                  logits.dim(), " dimensions, ", logits.numel(), " elements");
  const int64_t rows = logits.size(0), prototypes = logits.size(1);
  STD_TORCH_CHECK(prototypes == 1 || logits.stride(1) == 1, op, ": logits must be contiguous along K; got stride ",
                  logits.stride(1));
  STD_TORCH_CHECK(rows <= 1 || logits.stride(0) >= prototypes, op, ": the rows of logits must not overlap; got stride ",
                  logits.stride(0), " for K = ", prototypes);
  STD_TORCH_CHECK(temperature > 0, op, ": temperature must be > 0; got ", temperature);
  return {input(logits),
          element_of(op, "logits", logits),
          rows,
          prototypes,
          logits.stride(0),
          static_cast<float>(kLog2E / temperature),
          Inverse::of(temperature)};
}

SinkhornPlan plan_of(const SinkhornLogits& logits) {  // splits and ranges: the same for any width
  return sinkhorn_plan(logits.rows, logits.prototypes, logits.element, 1);
}

}  // namespace

#if !defined(DINOV3_EXT_WITH_CUDA)
int64_t sinkhorn_shares_cuda(const SinkhornLogits&) { return 0; }
int sinkhorn_iteration_cuda(const SinkhornIteration&, void*) { return kBuiltWithoutCuda; }
int sinkhorn_column_sums_cuda(const SinkhornColumnSums&, void*) { return kBuiltWithoutCuda; }
int sinkhorn_finish_cuda(const SinkhornFinish&, void*) { return kBuiltWithoutCuda; }
int sinkhorn_row_sums_cuda(const SinkhornRowSums&, void*) { return kBuiltWithoutCuda; }
#endif

std::tuple<Tensor, Tensor> sinkhorn_column_sums(const Tensor& logits, double temperature) {
  const char* op = "sinkhorn_column_sums";
  const SinkhornLogits checked = check_logits(op, logits, temperature);
  const int64_t splits = runs_on_cpu(logits) ? 0 : plan_of(checked).splits;
  Tensor partial = empty(logits, {2, splits, checked.prototypes}, ScalarType::Float);
  Tensor maxima = empty(logits, {checked.prototypes}, ScalarType::Float),
         sums = empty(logits, {checked.prototypes}, ScalarType::Float);
  const SinkhornColumnSums args{checked, output<float>(partial), output<float>(maxima), output<float>(sums)};
  launch(op, logits, args, sinkhorn_column_sums_cpu, sinkhorn_column_sums_cuda);
  return {maxima, sums};
}

Tensor sinkhorn_finish(const Tensor& sums, const Tensor& shift) {
  const char* op = "sinkhorn_finish";
  check_vector(op, "sums", sums, sums.numel(), sums);
  check_vector(op, "shift", shift, sums.numel(), sums);
  Tensor columns = empty(sums, {sums.numel()}, ScalarType::Float);
  const SinkhornFinish args{input<float>(sums), input<float>(shift), output<float>(columns), sums.numel()};
  launch(op, sums, args, sinkhorn_finish_cpu, sinkhorn_finish_cuda);
  return columns;
}

std::tuple<Tensor, Tensor> sinkhorn_row_sums(const Tensor& logits, const Tensor& previous, const Tensor& columns,
                                             double temperature, bool column_sums) {
  const char* op = "sinkhorn_row_sums";
  const SinkhornLogits checked = check_logits(op, logits, temperature);
  check_vector(op, "previous", previous, checked.rows, logits);
  check_vector(op, "columns", columns, checked.prototypes, logits);
  const int64_t splits = runs_on_cpu(logits) ? sinkhorn_splits_cpu(checked.rows) : plan_of(checked).splits;
  const int64_t ranges = runs_on_cpu(logits) ? 0 : plan_of(checked).ranges;
  Tensor rows = empty(logits, {checked.rows}, ScalarType::Float);
  Tensor row_partial = empty(logits, {2, ranges, checked.rows}, ScalarType::Float);
  // At least one element, so that "wanted" and "null" never mean the same.
  Tensor partial = empty(logits, {column_sums ? splits * checked.prototypes + 1 : 0}, ScalarType::Float);
  Tensor sums = empty(logits, {column_sums ? checked.prototypes : 0}, ScalarType::Float);
  const SinkhornRowSums args{checked,
                             input<float>(previous),
                             input<float>(columns),
                             output<float>(row_partial),
                             column_sums ? output<float>(partial) : nullptr,
                             output<float>(rows),
                             column_sums ? output<float>(sums) : nullptr};
  launch(op, logits, args, sinkhorn_row_sums_cpu, sinkhorn_row_sums_cuda);
  return {rows, sums};
}

namespace {

// As ranks that exchange between the steps do, on a CPU.
std::tuple<Tensor, Tensor> in_steps(const Tensor& logits, double temperature, int64_t iterations) {
  auto [columns, sums] = sinkhorn_column_sums(logits, temperature);
  float* shift = columns.mutable_data_ptr<float>();
  for (int64_t k = 0; k < columns.numel(); ++k) shift[k] = -shift[k];
  Tensor rows = empty(logits, {logits.size(0)}, ScalarType::Float);
  std::fill_n(rows.mutable_data_ptr<float>(), rows.numel(), 0.f);
  for (; iterations > 0; --iterations) {
    columns = sinkhorn_finish(sums, columns);
    std::tie(rows, sums) = sinkhorn_row_sums(logits, rows, columns, temperature, iterations > 1);
  }
  return {rows, columns};
}

}  // namespace

std::tuple<Tensor, Tensor> sinkhorn_potentials(const Tensor& logits, double temperature, int64_t iterations) {
  const char* op = "sinkhorn_potentials";
  const SinkhornLogits checked = check_logits(op, logits, temperature);
  STD_TORCH_CHECK(iterations >= 1, op, ": iterations must be >= 1; got ", iterations);
  if (runs_on_cpu(logits) && checked.rows > kSinkhornMostRowsCpu) return in_steps(logits, temperature, iterations);
  const int64_t shares = runs_on_cpu(logits) ? sinkhorn_shares_cpu(checked) : sinkhorn_shares_cuda(checked);
  Tensor partial = empty(logits, {shares}, ScalarType::Float);
  Tensor rows = empty(logits, {checked.rows}, ScalarType::Float),
         columns = empty(logits, {checked.prototypes}, ScalarType::Float);
  SinkhornIteration args{checked, true, output<float>(partial), output<float>(rows), output<float>(columns)};
  for (; iterations > 0; --iterations, args.first = false) {
    launch(op, logits, args, sinkhorn_iteration_cpu, sinkhorn_iteration_cuda);
  }
  return {rows, columns};
}

}  // namespace dinov3_ext
