// Launchers of the Sinkhorn-Knopp kernels: grid and vector width from the shape, nothing from the device.
#include "core/launch.cuh"
#include "ops/sinkhorn_knopp/sinkhorn_knopp_cuda.cuh"

namespace dinov3_ext {
namespace {

using sinkhorn::kRows;
using sinkhorn::kThreads;
using sinkhorn::kWarps;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

SinkhornPlan plan_of(const SinkhornLogits& logits, int width) {
  return sinkhorn_plan(logits.rows, logits.prototypes, logits.element, width);
}
// Splits and ranges do not depend on the width.
int64_t splits_of(const SinkhornLogits& logits) { return plan_of(logits, 1).splits; }
int64_t rows_of_split(const SinkhornLogits& logits) { return divide_up(logits.rows, splits_of(logits)); }

// Calls launch<element, width>() -> status; width: 16 bytes where every row of logits allows it, else 1. vector: of
// prototypes numbers, read 16 bytes at a time too.
template <class Launch>
auto with_width(const SinkhornLogits& logits, const float* vector, Launch launch) {
  auto choose = [&]<Element E>() {
    constexpr int width = kPerVector<E>;
    const bool aligned = reinterpret_cast<uintptr_t>(logits.data) % 16 == 0 && logits.row_stride % width == 0 &&
                         logits.prototypes % width == 0 && reinterpret_cast<uintptr_t>(vector) % 16 == 0;
    return aligned ? launch.template operator()<E, width>() : launch.template operator()<E, 1>();
  };
  switch (logits.element) {
    case Element::float32: return choose.template operator()<Element::float32>();
    case Element::bfloat16: return choose.template operator()<Element::bfloat16>();
    default: return choose.template operator()<Element::float16>();
  }
}

// One thread for each of `count` numbers.
Shape one_each(int64_t count) { return {.x = divide_up(count, kThreads), .threads = kThreads}; }

// A warp's 32 `width` columns to a block, `splits` of the rows; numbers: floats kept for every column and warp.
Shape column_shape(int64_t prototypes, int width, int64_t splits, int numbers) {
  return {.x = divide_up(prototypes, 32 * width),
          .y = splits,
          .threads = kThreads,
          .shared_bytes = numbers * kWarps * 32 * width * 4};
}

}  // namespace

int64_t sinkhorn_shares_cuda(const SinkhornLogits& logits) {
  const auto shares = [&]<Element E, int N>() { return 2 * logits.rows * plan_of(logits, N).tiles; };
  return with_width(logits, nullptr, shares);
}

int sinkhorn_iteration_cuda(const SinkhornIteration& args, void* stream) {
  return with_width(args.logits, nullptr, [&]<Element E, int N>() {
    const SinkhornPlan plan = plan_of(args.logits, N);
    const Shape shape{.x = plan.tiles, .threads = kThreads, .shared_bytes = plan.shared_bytes};
    int status;
    if constexpr (N == 1) {
      status = plan.kept ? launch<sinkhorn::iteration_tile<E, 1, 32, true>>(shape, stream, args)
                         : launch<sinkhorn::iteration_tile<E, 1, 32, false>>(shape, stream, args);
    } else {
      status = plan.lanes == 32  ? launch<sinkhorn::iteration_tile<E, N, 32, true>>(shape, stream, args)
               : plan.lanes == 8 ? launch<sinkhorn::iteration_tile<E, N, 8, true>>(shape, stream, args)
               : plan.kept       ? launch<sinkhorn::iteration_tile<E, N, 4, true>>(shape, stream, args)
                                 : launch<sinkhorn::iteration_tile<E, N, 4, false>>(shape, stream, args);
    }
    if (status) return status;
    const Shape rows{.x = divide_up(args.logits.rows, kWarps), .threads = kThreads};
    return launch<sinkhorn::iteration_rows>(rows, stream, args, plan.tiles);
  });
}

int sinkhorn_column_sums_cuda(const SinkhornColumnSums& args, void* stream) {
  const SinkhornLogits& logits = args.logits;
  const int64_t splits = splits_of(logits);
  const int status = with_width(logits, nullptr, [&]<Element E, int N>() {
    return launch<sinkhorn::column_partial<E, N>>(column_shape(logits.prototypes, N, splits, 2), stream, args,
                                                  rows_of_split(logits));
  });
  if (status || splits == 1) return status;
  return launch<sinkhorn::column_combine>(one_each(logits.prototypes), stream, args, splits);
}

int sinkhorn_finish_cuda(const SinkhornFinish& args, void* stream) {
  return launch<sinkhorn::finish>(one_each(args.prototypes), stream, args);
}

int sinkhorn_row_sums_cuda(const SinkhornRowSums& args, void* stream) {
  const SinkhornLogits& logits = args.logits;
  const int64_t ranges = plan_of(logits, 1).ranges;
  int status = with_width(logits, args.columns, [&]<Element E, int N>() {
    const int64_t step = kThreads * N, columns = divide_up(divide_up(logits.prototypes, ranges), step) * step;
    const Shape shape{
        .x = divide_up(logits.rows, kRows) * ranges, .threads = kThreads, .shared_bytes = kRows * 2 * kWarps * 4};
    return launch<sinkhorn::row_partial<E, N>>(shape, stream, args, ranges, columns);
  });
  if (!status && ranges > 1) status = launch<sinkhorn::row_combine>(one_each(logits.rows), stream, args, ranges);
  if (status || !args.partial) return status;
  const int64_t splits = splits_of(logits);
  status = with_width(logits, args.columns, [&]<Element E, int N>() {
    return launch<sinkhorn::next_partial<E, N>>(column_shape(logits.prototypes, N, splits, 1), stream, args,
                                                rows_of_split(logits));
  });
  if (status || splits == 1) return status;
  return launch<sinkhorn::next_combine>(one_each(logits.prototypes), stream, args, splits);
}

}  // namespace dinov3_ext
