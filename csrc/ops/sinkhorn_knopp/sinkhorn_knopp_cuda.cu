// Launchers of the Sinkhorn-Knopp kernels: grid and vector width from the shape, nothing from the device.
#include <cuda_runtime.h>

#include <algorithm>

#include "ops/sinkhorn_knopp/sinkhorn_knopp_cuda.cuh"

namespace dinov3_ext {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned column_blocks(int64_t prototypes, int width) {
  return unsigned(divide_up(prototypes, kColumnThreads * width));
}

int64_t rows_of_split(const SinkhornLogits& logits) {
  return divide_up(logits.rows, std::max<int64_t>(1, sinkhorn_splits_cuda(logits.rows, logits.prototypes)));
}

// Calls launch(element, width) with both as compile-time constants; width: 16 bytes where every row allows it, else 1.
template <class Launch>
void with_width(const SinkhornLogits& logits, Launch launch) {
  auto choose = [&]<Element E>() {
    constexpr int width = kPerVector<E>;
    const bool aligned = reinterpret_cast<uintptr_t>(logits.data) % 16 == 0 && logits.row_stride % width == 0 &&
                         logits.prototypes % width == 0;
    aligned ? launch.template operator()<E, width>() : launch.template operator()<E, 1>();
  };
  switch (logits.element) {
    case Element::float32: return choose.template operator()<Element::float32>();
    case Element::bfloat16: return choose.template operator()<Element::bfloat16>();
    case Element::float16: return choose.template operator()<Element::float16>();
  }
}

}  // namespace

// Enough blocks to fill a large GPU (some 1024), at least eight rows each, whatever GPU runs it.
int64_t sinkhorn_splits_cuda(int64_t rows, int64_t prototypes) {
  const int64_t wanted = std::max<int64_t>(1, 1024 / column_blocks(prototypes, 8));
  return std::clamp<int64_t>(divide_up(rows, 8), 1, std::min<int64_t>(wanted, 64));
}

int sinkhorn_column_sums_cuda(const SinkhornColumnSums& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const SinkhornLogits& logits = args.logits;
  const int64_t splits = sinkhorn_splits_cuda(logits.rows, logits.prototypes);
  with_width(logits, [&]<Element E, int N>() {
    const dim3 grid(column_blocks(logits.prototypes, N), unsigned(splits));
    column_partial<E, N><<<grid, kColumnThreads, 0, cuda_stream>>>(args, rows_of_split(logits));
  });
  column_combine<<<column_blocks(logits.prototypes, 1), kColumnThreads, 0, cuda_stream>>>(args, splits);
  return int(cudaGetLastError());
}

int sinkhorn_finish_cuda(const SinkhornFinish& args, void* stream) {
  finish<<<column_blocks(args.prototypes, 1), kColumnThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return int(cudaGetLastError());
}

int sinkhorn_row_sums_cuda(const SinkhornRowSums& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const SinkhornLogits& logits = args.logits;
  const int64_t splits = sinkhorn_splits_cuda(logits.rows, logits.prototypes);
  with_width(logits, [&]<Element E, int N>() {
    if (logits.rows > 0)
      row_potential<E, N><<<unsigned(logits.rows), kRowThreads, kRowThreads / 8, cuda_stream>>>(args);
    if (!args.partial) return;
    const dim3 grid(column_blocks(logits.prototypes, N), unsigned(splits));
    next_partial<E, N><<<grid, kColumnThreads, 0, cuda_stream>>>(args, rows_of_split(logits));
  });
  if (args.partial) {
    next_combine<<<column_blocks(logits.prototypes, 1), kColumnThreads, 0, cuda_stream>>>(args, splits);
  }
  return int(cudaGetLastError());
}

}  // namespace dinov3_ext
