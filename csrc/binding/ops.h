// The functions behind the schemas of library.cpp, one line per op and device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace dinov3_ext {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> gram_loss(const Tensor& student, const Tensor& teacher, std::string_view clip,
                                     bool gradient);

std::tuple<Tensor, Tensor> sinkhorn_potentials(const Tensor& logits, double temperature, int64_t iterations);
std::tuple<Tensor, Tensor> sinkhorn_column_sums(const Tensor& logits, double temperature);
Tensor sinkhorn_finish(const Tensor& sums, const Tensor& shift);
std::tuple<Tensor, Tensor> sinkhorn_row_sums(const Tensor& logits, const Tensor& previous, const Tensor& columns,
                                             double temperature, bool column_sums);

std::tuple<Tensor, Tensor> assignment_cross_entropy(const Tensor& student, const Tensor& teacher, const Tensor& rows,
                                                    const Tensor& columns, double student_temperature,
                                                    double teacher_temperature, const std::optional<Tensor>& weight);
Tensor assignment_cross_entropy_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                         const Tensor& rows, const Tensor& columns, const Tensor& log_sums,
                                         double student_temperature, double teacher_temperature,
                                         const std::optional<Tensor>& weight);
// Writes the gradient over `student`.
void assignment_cross_entropy_backward_(const Tensor& grad, Tensor& student, const Tensor& teacher, const Tensor& rows,
                                        const Tensor& columns, const Tensor& log_sums, double student_temperature,
                                        double teacher_temperature, const std::optional<Tensor>& weight);

Tensor rope_rotate(const Tensor& qkv, const Tensor& rope, const Tensor& sequences, std::vector<int64_t> groups);
Tensor rope_rotate_backward(const Tensor& grad, const Tensor& rope, const Tensor& sequences,
                            std::vector<int64_t> groups);
std::tuple<Tensor, Tensor> rope_attention(const Tensor& qkv, const Tensor& rope, const Tensor& sequences,
                                          std::vector<int64_t> groups, double scale);
Tensor rope_attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& rope, const Tensor& sequences,
                               std::vector<int64_t> groups, const Tensor& out, const Tensor& lse, double scale);

}  // namespace dinov3_ext
