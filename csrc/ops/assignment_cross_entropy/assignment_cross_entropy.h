// Cross-entropy of student logits against Sinkhorn-Knopp assignments that are never stored. Torch-free: this header is
// all that the kernels and the binding share.
//
// With s[c, b, k] = student[c, b, k] / student_temperature, natural-log potentials rows[a B + b], columns[k] and
// p[a, b, k] = exp(teacher[a, b, k] / teacher_temperature + rows[a B + b] + columns[k]):
//   forward:   log_sums[c, b] = log sum_k exp(s[c, b, k])
//              losses[c, a] = sum_b weight[b] sum_k p[a, b, k] (log_sums[c, b] - s[c, b, k])
//   backward:  gradient[c, b, k] = weight[b] / student_temperature
//                                  * sum_a grad[c, a] (exp(s[c, b, k] - log_sums[c, b]) - p[a, b, k])
// Products with the potentials stay in logarithms until their sum is taken, so that large logits stay finite. A teacher
// logit of -inf is a probability of zero. Without images the losses are zero.
//
// Sums are fp32 in an order that depends on the shape alone: not on threads, not on the GPU. Offsets are int64.
#pragma once

#include <cstdint>

#include "core/element.h"
#include "core/inverse.h"
#include "core/parallel.h"

namespace dinov3_ext {

// (crops, images, prototypes), the last dimension contiguous; element (c, b, k) at c crop_stride + b row_stride + k.
struct AssignmentLogits {
  const void* data;
  int64_t crops;        // >= 0: C of the student, A of the teacher
  int64_t crop_stride;  // in elements
  int64_t row_stride;   // in elements
};

struct AssignmentProblem {
  AssignmentLogits student;
  AssignmentLogits teacher;
  Element element;       // type of both
  int64_t images;        // B >= 0: images, or masked patches
  int64_t prototypes;    // K >= 1
  const float* rows;     // (A B,), order (A, B)
  const float* columns;  // (K,)
  const float* weight;   // (B,), or null: 1 / B each
  float student_scale;   // log2(e) / student_temperature
  float teacher_scale;   // log2(e) / teacher_temperature
  double teacher_temperature;
  // 1 / temperature. Potentials and a row's logarithm are large where logits are, and close to the negative score: sums
  // of the two taken in natural logarithms and multiplied by log2(e) at the end lose half of what sums in units of log2
  // do, whose terms are rounded twice.
  Inverse student_inverse;
  Inverse teacher_inverse;
};

struct AssignmentCrossEntropy {
  AssignmentProblem problem;
  float* workspace;  // assignment_cross_entropy_workspace_cuda() floats; CUDA only, null on the CPU
  float* losses;     // out (C, A)
  double* log_sums;  // out (C, B), natural logarithms
};

struct AssignmentCrossEntropyBackward {
  AssignmentProblem problem;
  // (C, B). Double, because the difference to the score of a likely prototype is small: in fp32 its rounding alone
  // would lose as much as all of PyTorch's log_softmax.
  const double* log_sums;
  const float* grad;  // (C, A), of the losses
  // out (C, B, K), type and layout rules of the student's logits; may be the student's own storage with its own
  // strides: every element is read before it is written, by the thread that writes it.
  void* gradient;
  int64_t gradient_crop_stride;
  int64_t gradient_row_stride;
};

void assignment_cross_entropy_cpu(const AssignmentCrossEntropy& args, ParallelFor parallel_for);
void assignment_cross_entropy_backward_cpu(const AssignmentCrossEntropyBackward& args, ParallelFor parallel_for);

// Launchers: enqueue on `stream` (a cudaStream_t), return a cudaError_t as int, never wait.
int64_t assignment_cross_entropy_workspace_cuda(int64_t crops, int64_t views, int64_t images, int64_t prototypes);
int assignment_cross_entropy_cuda(const AssignmentCrossEntropy& args, void* stream);
int assignment_cross_entropy_backward_cuda(const AssignmentCrossEntropyBackward& args, void* stream);

}  // namespace dinov3_ext
