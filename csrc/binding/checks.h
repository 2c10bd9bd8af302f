// Checks of the registered ops' tensors. Users see the ValueErrors of dinov3_ext/ops; these guard direct callers of
// torch.ops.dinov3_ext.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "core/element.h"

namespace dinov3_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Element element_of(const char* op, const char* argument, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return Element::float32;
  if (type == ScalarType::BFloat16) return Element::bfloat16;
  if (type == ScalarType::Half) return Element::float16;
  STD_TORCH_CHECK(false, op, ": ", argument, " must be float32, bfloat16 or float16; got ",
                  torch::headeronly::toString(type));
}

// A contiguous fp32 vector of `length` elements on the device of `like`.
inline void check_vector(const char* op, const char* argument, const Tensor& tensor, int64_t length,
                         const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 && tensor.size(0) == length &&
                      tensor.is_contiguous(),
                  op, ": ", argument, " must be a contiguous float32 vector of ", length, " elements; got ",
                  tensor.dim(), " dimensions, ", tensor.numel(), " elements of ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.device() == like.device(), op, ": ", argument, " must be on the device of the first argument");
}

}  // namespace dinov3_ext
