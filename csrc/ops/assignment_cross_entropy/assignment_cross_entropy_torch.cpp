// The cross-entropy against Sinkhorn-Knopp assignments for torch: checks, allocation, launch.
#include "binding/checks.h"
#include "binding/device.h"
#include "binding/ops.h"
#include "ops/assignment_cross_entropy/assignment_cross_entropy.h"

namespace dinov3_ext {
namespace {

constexpr double kLog2E = 1.4426950408889634;

AssignmentLogits check_logits(const char* op, const char* argument, const Tensor& logits, const Tensor& like) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.size(2) >= 1, op, ": ", argument,
                  " must be (crops, B, K) with K >= 1; got ", logits.dim(), " dimensions, ", logits.numel(),
                  " elements");
  STD_TORCH_CHECK(logits.size(1) == like.size(1) && logits.size(2) == like.size(2), op, ": ", argument,
                  " must share B and K with student, ", like.size(1), " and ", like.size(2), "; got ", logits.size(1),
                  " and ", logits.size(2));
  STD_TORCH_CHECK(logits.scalar_type() == like.scalar_type() && logits.device() == like.device(), op, ": ", argument,
                  " must have the type and the device of student");
  STD_TORCH_CHECK(logits.size(2) == 1 || logits.stride(2) == 1, op, ": ", argument,
                  " must be contiguous along K; got stride ", logits.stride(2));
  return {input(logits), logits.size(0), logits.stride(0), logits.stride(1)};
}

AssignmentProblem check_problem(const char* op, const Tensor& student, const Tensor& teacher, const Tensor& rows,
                                const Tensor& columns, double student_temperature, double teacher_temperature,
                                const std::optional<Tensor>& weight) {
  AssignmentProblem problem;
  problem.element = element_of(op, "student", student);
  problem.student = check_logits(op, "student", student, student);
  problem.teacher = check_logits(op, "teacher", teacher, student);
  problem.images = student.size(1), problem.prototypes = student.size(2);
  check_vector(op, "rows", rows, problem.teacher.crops * problem.images, student);
  check_vector(op, "columns", columns, problem.prototypes, student);
  if (weight) check_vector(op, "weight", *weight, problem.images, student);
  STD_TORCH_CHECK(student_temperature > 0 && teacher_temperature > 0, op, ": temperatures must be > 0; got ",
                  student_temperature, " and ", teacher_temperature);
  problem.rows = input<float>(rows), problem.columns = input<float>(columns);
  problem.weight = weight ? input<float>(*weight) : nullptr;
  problem.teacher_temperature = teacher_temperature;
  problem.student_scale = static_cast<float>(kLog2E / student_temperature);
  problem.teacher_scale = static_cast<float>(kLog2E / teacher_temperature);
  problem.student_inverse = Inverse::of(student_temperature);
  problem.teacher_inverse = Inverse::of(teacher_temperature);
  return problem;
}

// Whether no element of (C, B, K) logits lies where another one does.
bool rows_are_apart(const Tensor& logits) {
  const int64_t crops = logits.size(0), images = logits.size(1), prototypes = logits.size(2);
  const int64_t crop_stride = logits.stride(0), row_stride = logits.stride(1);
  if (logits.numel() == 0) return true;
  if (crops == 1) return images == 1 || row_stride >= prototypes;
  if (images == 1) return crop_stride >= prototypes;
  return crop_stride <= row_stride ? crop_stride >= prototypes && row_stride >= crop_stride * (crops - 1) + prototypes
                                   : row_stride >= prototypes && crop_stride >= row_stride * (images - 1) + prototypes;
}

// `gradient` may be `student` itself.
void backward_into(const char* op, Tensor& gradient, const Tensor& grad, const Tensor& student, const Tensor& teacher,
                   const Tensor& rows, const Tensor& columns, const Tensor& log_sums, double student_temperature,
                   double teacher_temperature, const std::optional<Tensor>& weight) {
  AssignmentCrossEntropyBackward args;
  args.problem = check_problem(op, student, teacher, rows, columns, student_temperature, teacher_temperature, weight);
  const auto check_matrix = [&](const char* argument, const Tensor& matrix, ScalarType type, int64_t columns) {
    STD_TORCH_CHECK(matrix.scalar_type() == type && matrix.dim() == 2 && matrix.size(0) == args.problem.student.crops &&
                        matrix.size(1) == columns && matrix.is_contiguous() && matrix.device() == student.device(),
                    op, ": ", argument, " must be a contiguous ", torch::headeronly::toString(type), " (",
                    args.problem.student.crops, ", ", columns, ") matrix on the device of student; got ", matrix.dim(),
                    " dimensions, ", matrix.numel(), " elements of ",
                    torch::headeronly::toString(matrix.scalar_type()));
  };
  check_matrix("grad", grad, ScalarType::Float, args.problem.teacher.crops);
  check_matrix("log_sums", log_sums, ScalarType::Double, args.problem.images);
  args.grad = input<float>(grad), args.log_sums = input<double>(log_sums);
  args.gradient = output(gradient);
  args.gradient_crop_stride = gradient.stride(0), args.gradient_row_stride = gradient.stride(1);
  launch(op, student, args, assignment_cross_entropy_backward_cpu, assignment_cross_entropy_backward_cuda);
}

}  // namespace

#if !defined(DINOV3_EXT_WITH_CUDA)
int64_t assignment_cross_entropy_workspace_cuda(int64_t, int64_t, int64_t, int64_t) { return 0; }
int assignment_cross_entropy_cuda(const AssignmentCrossEntropy&, void*) { return kBuiltWithoutCuda; }
int assignment_cross_entropy_backward_cuda(const AssignmentCrossEntropyBackward&, void*) { return kBuiltWithoutCuda; }
#endif

std::tuple<Tensor, Tensor> assignment_cross_entropy(const Tensor& student, const Tensor& teacher, const Tensor& rows,
                                                    const Tensor& columns, double student_temperature,
                                                    double teacher_temperature, const std::optional<Tensor>& weight) {
  const char* op = "assignment_cross_entropy";
  AssignmentCrossEntropy args;
  args.problem = check_problem(op, student, teacher, rows, columns, student_temperature, teacher_temperature, weight);
  const int64_t crops = args.problem.student.crops, views = args.problem.teacher.crops, images = args.problem.images;
  Tensor losses = empty(student, {crops, views}, ScalarType::Float);
  Tensor log_sums = empty(student, {crops, images}, ScalarType::Double);
  Tensor workspace = empty(
      student,
      {runs_on_cpu(student) ? 0
                            : assignment_cross_entropy_workspace_cuda(crops, views, images, args.problem.prototypes)},
      ScalarType::Float);
  args.workspace = runs_on_cpu(student) ? nullptr : output<float>(workspace);
  args.losses = output<float>(losses), args.log_sums = output<double>(log_sums);
  launch(op, student, args, assignment_cross_entropy_cpu, assignment_cross_entropy_cuda);
  return {losses, log_sums};
}

Tensor assignment_cross_entropy_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                         const Tensor& rows, const Tensor& columns, const Tensor& log_sums,
                                         double student_temperature, double teacher_temperature,
                                         const std::optional<Tensor>& weight) {
  const char* op = "assignment_cross_entropy_backward";
  STD_TORCH_CHECK(student.dim() == 3, op, ": student must be (C, B, K); got ", student.dim(), " dimensions");
  Tensor gradient = empty(student, {student.size(0), student.size(1), student.size(2)}, student.scalar_type());
  backward_into(op, gradient, grad, student, teacher, rows, columns, log_sums, student_temperature, teacher_temperature,
                weight);
  return gradient;
}

void assignment_cross_entropy_backward_(const Tensor& grad, Tensor& student, const Tensor& teacher, const Tensor& rows,
                                        const Tensor& columns, const Tensor& log_sums, double student_temperature,
                                        double teacher_temperature, const std::optional<Tensor>& weight) {
  const char* op = "assignment_cross_entropy_backward_";
  STD_TORCH_CHECK(student.dim() == 3, op, ": student must be (C, B, K); got ", student.dim(), " dimensions");
  STD_TORCH_CHECK(rows_are_apart(student), op, ": the rows of student must not overlap; got strides ",
                  student.stride(0), " and ", student.stride(1), " for K = ", student.size(2));
  backward_into(op, student, grad, student, teacher, rows, columns, log_sums, student_temperature, teacher_temperature,
                weight);
}

}  // namespace dinov3_ext
