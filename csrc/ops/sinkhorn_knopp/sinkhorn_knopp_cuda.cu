// Launchers of the Sinkhorn-Knopp kernels: grid and vector width from the shape, nothing from the device.
#include <algorithm>

#include "core/launch.cuh"
#include "ops/sinkhorn_knopp/sinkhorn_knopp_cuda.cuh"

namespace dinov3_ext {
namespace {

using sinkhorn::kRows;
using sinkhorn::kThreads;
using sinkhorn::kWarps;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t rows_of_split(const SinkhornLogits& logits) {
  return divide_up(logits.rows, sinkhorn_splits_cuda(logits.rows, logits.prototypes));
}

// Calls launch<element, width>() -> status; width: 16 bytes where every row of logits allows it, else 1. vector: of
// prototypes numbers, read 16 bytes at a time too.
template <class Launch>
int with_width(const SinkhornLogits& logits, const float* vector, Launch launch) {
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

// Some 1024 blocks of 256 columns, and at least 128 rows in each, so that partial results stay small beside the logits.
int64_t sinkhorn_splits_cuda(int64_t rows, int64_t prototypes) {
  const int64_t wanted = std::max<int64_t>(1, 1024 / divide_up(prototypes, 256));
  return std::clamp<int64_t>(divide_up(rows, 128), 1, std::min<int64_t>(wanted, 64));
}

// Some 1024 blocks of kRows rows, and at least 4096 columns in each, so that the sums over a block stay small.
int64_t sinkhorn_ranges_cuda(int64_t rows, int64_t prototypes) {
  const int64_t wanted = divide_up(1024, std::max<int64_t>(1, divide_up(rows, kRows)));
  return std::clamp<int64_t>(wanted, 1, divide_up(prototypes, 4096));
}

int sinkhorn_column_sums_cuda(const SinkhornColumnSums& args, void* stream) {
  const SinkhornLogits& logits = args.logits;
  const int64_t splits = sinkhorn_splits_cuda(logits.rows, logits.prototypes);
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
  const int64_t ranges = sinkhorn_ranges_cuda(logits.rows, logits.prototypes);
  int status = with_width(logits, args.columns, [&]<Element E, int N>() {
    const int64_t step = kThreads * N, columns = divide_up(divide_up(logits.prototypes, ranges), step) * step;
    const Shape shape{
        .x = divide_up(logits.rows, kRows) * ranges, .threads = kThreads, .shared_bytes = kRows * 2 * kWarps * 4};
    return launch<sinkhorn::row_partial<E, N>>(shape, stream, args, ranges, columns);
  });
  if (!status && ranges > 1) status = launch<sinkhorn::row_combine>(one_each(logits.rows), stream, args, ranges);
  if (status || !args.partial) return status;
  const int64_t splits = sinkhorn_splits_cuda(logits.rows, logits.prototypes);
  status = with_width(logits, args.columns, [&]<Element E, int N>() {
    return launch<sinkhorn::next_partial<E, N>>(column_shape(logits.prototypes, N, splits, 1), stream, args,
                                                rows_of_split(logits));
  });
  if (status || splits == 1) return status;
  return launch<sinkhorn::next_combine>(one_each(logits.prototypes), stream, args, splits);
}

}  // namespace dinov3_ext
