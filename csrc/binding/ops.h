// The functions behind the schemas of library.cpp, one line per op and device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string_view>
#include <tuple>

namespace dinov3_ext {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> gram_loss(const Tensor& student, const Tensor& teacher, std::string_view clip,
                                     bool gradient);

std::tuple<Tensor, Tensor> sinkhorn_column_sums(const Tensor& logits, double temperature);
Tensor sinkhorn_finish(const Tensor& sums, const Tensor& shift);
std::tuple<Tensor, Tensor> sinkhorn_row_sums(const Tensor& logits, const Tensor& previous, const Tensor& columns,
                                             double temperature, bool column_sums);

}  // namespace dinov3_ext
