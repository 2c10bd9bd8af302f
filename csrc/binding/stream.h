// Where a launcher runs: the tensor's device made current, torch's current stream on it.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

namespace dinov3_ext {

struct DeviceStream {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;  // cudaStream_t

  explicit DeviceStream(const torch::stable::Tensor& tensor)
      : guard(tensor.get_device_index()),
        stream(torch::stable::accelerator::getCurrentStream(tensor.get_device_index()).nativeHandle()) {}
};

}  // namespace dinov3_ext
