// Sinkhorn-Knopp for torch: checks, allocation, launch. One function per op; the tensor's device chooses the kernel.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "binding/checks.h"
#include "binding/ops.h"
#include "binding/stream.h"
#include "core/cuda_status.h"
#include "ops/sinkhorn_knopp/sinkhorn_knopp.h"

namespace dinov3_ext {
namespace {

constexpr double kLog2E = 1.4426950408889634;

void torch_parallel(int64_t begin, int64_t end, ParallelBody body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, /*grain_size=*/1, body, context));
}

SinkhornLogits check_logits(const char* op, const Tensor& logits, double temperature) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1, op, ": logits must be (rows, K) with K >= 1; got ",
                  logits.dim(), " dimensions, ", logits.numel(), " elements");
  const int64_t rows = logits.size(0), prototypes = logits.size(1);
  STD_TORCH_CHECK(prototypes == 1 || logits.stride(1) == 1, op, ": logits must be contiguous along K; got stride ",
                  logits.stride(1));
  STD_TORCH_CHECK(rows <= 1 || logits.stride(0) >= prototypes, op, ": the rows of logits must not overlap; got stride ",
                  logits.stride(0), " for K = ", prototypes);
  STD_TORCH_CHECK(temperature > 0, op, ": temperature must be > 0; got ", temperature);
  return {logits.const_data_ptr(), element_of(op, "logits", logits),        rows, prototypes,
          logits.stride(0),        static_cast<float>(kLog2E / temperature)};
}

Tensor empty_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                                  ScalarType::Float);
}

// Runs cpu(args) or, on the tensor's device and stream, cuda(args).
template <class Args>
void launch(const char* op, const Tensor& tensor, const Args& args, void (*cpu)(const Args&, ParallelFor),
            int (*cuda)(const Args&, void*)) {
  if (tensor.is_cpu()) return cpu(args, torch_parallel);
  const DeviceStream device(tensor);
  const int status = cuda(args, device.stream);
  STD_TORCH_CHECK(status == 0, op, ": the CUDA launch failed: ", cuda_status_text(status));
}

}  // namespace

#if !defined(DINOV3_EXT_WITH_CUDA)
int64_t sinkhorn_splits_cuda(int64_t, int64_t) { return 0; }
int sinkhorn_column_sums_cuda(const SinkhornColumnSums&, void*) { return kBuiltWithoutCuda; }
int sinkhorn_finish_cuda(const SinkhornFinish&, void*) { return kBuiltWithoutCuda; }
int sinkhorn_row_sums_cuda(const SinkhornRowSums&, void*) { return kBuiltWithoutCuda; }
#endif

std::tuple<Tensor, Tensor> sinkhorn_column_sums(const Tensor& logits, double temperature) {
  const char* op = "sinkhorn_column_sums";
  const SinkhornLogits checked = check_logits(op, logits, temperature);
  const int64_t splits = logits.is_cpu() ? 0 : sinkhorn_splits_cuda(checked.rows, checked.prototypes);
  Tensor partial = empty_floats(logits, {2, splits, checked.prototypes});
  Tensor maxima = empty_floats(logits, {checked.prototypes}), sums = empty_floats(logits, {checked.prototypes});
  const SinkhornColumnSums args{checked, partial.mutable_data_ptr<float>(), maxima.mutable_data_ptr<float>(),
                                sums.mutable_data_ptr<float>()};
  launch(op, logits, args, sinkhorn_column_sums_cpu, sinkhorn_column_sums_cuda);
  return {maxima, sums};
}

Tensor sinkhorn_finish(const Tensor& sums, const Tensor& shift) {
  const char* op = "sinkhorn_finish";
  check_vector(op, "sums", sums, sums.numel(), sums);
  check_vector(op, "shift", shift, sums.numel(), sums);
  Tensor columns = empty_floats(sums, {sums.numel()});
  const SinkhornFinish args{sums.const_data_ptr<float>(), shift.const_data_ptr<float>(),
                            columns.mutable_data_ptr<float>(), sums.numel()};
  launch(op, sums, args, sinkhorn_finish_cpu, sinkhorn_finish_cuda);
  return columns;
}

std::tuple<Tensor, Tensor> sinkhorn_row_sums(const Tensor& logits, const Tensor& previous, const Tensor& columns,
                                             double temperature, bool column_sums) {
  const char* op = "sinkhorn_row_sums";
  const SinkhornLogits checked = check_logits(op, logits, temperature);
  check_vector(op, "previous", previous, checked.rows, logits);
  check_vector(op, "columns", columns, checked.prototypes, logits);
  const int64_t splits =
      logits.is_cpu() ? sinkhorn_splits_cpu(checked.rows) : sinkhorn_splits_cuda(checked.rows, checked.prototypes);
  Tensor rows = empty_floats(logits, {checked.rows});
  // At least one element, so that "wanted" and "null" never mean the same.
  Tensor partial = empty_floats(logits, {column_sums ? splits * checked.prototypes + 1 : 0});
  Tensor sums = empty_floats(logits, {column_sums ? checked.prototypes : 0});
  const SinkhornRowSums args{checked,
                             previous.const_data_ptr<float>(),
                             columns.const_data_ptr<float>(),
                             column_sums ? partial.mutable_data_ptr<float>() : nullptr,
                             rows.mutable_data_ptr<float>(),
                             column_sums ? sums.mutable_data_ptr<float>() : nullptr};
  launch(op, logits, args, sinkhorn_row_sums_cpu, sinkhorn_row_sums_cuda);
  return {rows, sums};
}

}  // namespace dinov3_ext
