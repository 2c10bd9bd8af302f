// Between tensors and kernels: storage, where to run, on which stream, and what a failed launch says.
//
// In the emulator's library (DINOV3_EXT_EMULATOR) CPU tensors run the CUDA launchers: every pointer handed to a kernel
// is announced, so that accesses outside the tensor are found, and new tensors begin as NaN. The pointers cannot be
// followed by the host, as those of a GPU cannot.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "core/cuda_status.h"
#include "core/parallel.h"
#if defined(DINOV3_EXT_EMULATOR)
#include "emulator/memory.h"
#endif

namespace dinov3_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether the CPU kernel serves `tensor`, not the CUDA launcher.
inline bool runs_on_cpu(const Tensor& tensor) {
#if defined(DINOV3_EXT_EMULATOR)
  (void)tensor;
  return false;
#else
  return tensor.is_cpu();
#endif
}

// Bytes from the first to behind the last element, strides counted.
inline int64_t extent_in_bytes(const Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return (last + 1) * int64_t(tensor.element_size());
}

// Storage a kernel only reads.
template <class T = void>
const T* input(const Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
#if defined(DINOV3_EXT_EMULATOR)
  emulator::announce(data, extent_in_bytes(tensor), /*writable=*/false);
  data = emulator::device_pointer(data);
#endif
  return static_cast<const T*>(data);
}

// Storage a kernel writes.
template <class T = void>
T* output(Tensor& tensor) {
  void* data = tensor.mutable_data_ptr();
#if defined(DINOV3_EXT_EMULATOR)
  emulator::announce(data, extent_in_bytes(tensor), /*writable=*/true);
  data = emulator::device_pointer(data);
#endif
  return static_cast<T*>(data);
}

// A new contiguous tensor on the device of `like`, not initialised (the emulator: all bits set, NaN).
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  Tensor tensor =
      torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
#if defined(DINOV3_EXT_EMULATOR)
  emulator::poison(tensor.mutable_data_ptr(), extent_in_bytes(tensor));
#endif
  return tensor;
}

// Runs cuda(args, stream) on the tensor's device and torch's current stream.
template <class Args>
void launch_on_device(const char* op, const Tensor& tensor, const Args& args, int (*cuda)(const Args&, void*)) {
#if defined(DINOV3_EXT_EMULATOR)
  (void)tensor;
  const int status = cuda(args, nullptr);
#else
  const int32_t index = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const int status = cuda(args, torch::stable::accelerator::getCurrentStream(index).nativeHandle());
#endif
  STD_TORCH_CHECK(status == 0, op, ": the CUDA launch failed: ", cuda_status_text(status));
}

// torch::parallel_for in the form that the torch-free CPU kernels take.
inline void torch_parallel(int64_t begin, int64_t end, ParallelBody body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, /*grain_size=*/1, body, context));
}

// Runs cpu(args, parallel_for), or cuda as above.
template <class Args>
void launch(const char* op, const Tensor& tensor, const Args& args, void (*cpu)(const Args&, ParallelFor),
            int (*cuda)(const Args&, void*)) {
  if (runs_on_cpu(tensor)) return cpu(args, torch_parallel);
  launch_on_device(op, tensor, args, cuda);
}

}  // namespace dinov3_ext
