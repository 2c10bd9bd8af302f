// gram_loss for torch: checks, allocation, launch.
#include <string>
#include <string_view>

#include "binding/checks.h"
#include "binding/device.h"
#include "binding/ops.h"
#include "ops/gram_loss/gram_loss.h"
#include "ops/gram_loss/gram_loss_plan.h"

namespace dinov3_ext {
namespace {

constexpr const char* kOp = "gram_loss";

GramFeatures check_features(const char* argument, const Tensor& features, const Tensor& student) {
  STD_TORCH_CHECK(features.dim() == 3 && features.numel() > 0, kOp, ": ", argument,
                  " must be (S, N, D), none of them zero; got ", features.dim(), " dimensions, ", features.numel(),
                  " elements");
  for (int64_t i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(features.size(i) == student.size(i), kOp, ": ", argument, " must have the student's shape (",
                    student.size(0), ", ", student.size(1), ", ", student.size(2), "); got (", features.size(0), ", ",
                    features.size(1), ", ", features.size(2), ")");
  }
  STD_TORCH_CHECK(features.device() == student.device(), kOp, ": ", argument, " must be on the student's device");
  return {input(features), element_of(kOp, argument, features), features.stride(0), features.stride(1),
          features.stride(2)};
}

GramClip clip_of(std::string_view clip) {
  if (clip == "none") return GramClip::none;
  if (clip == "both") return GramClip::both;
  STD_TORCH_CHECK(clip == "teacher", kOp, ": clip must be none, both or teacher; got ", std::string(clip));
  return GramClip::teacher;
}

ScalarType scalar_type(Element element) {
  return element == Element::float32    ? ScalarType::Float
         : element == Element::bfloat16 ? ScalarType::BFloat16
                                        : ScalarType::Half;
}

}  // namespace

#if !defined(DINOV3_EXT_WITH_CUDA)
int64_t gram_loss_workspace_cuda(const GramLoss&) { return 0; }
int gram_loss_cuda(const GramLoss&, void*) { return kBuiltWithoutCuda; }
#endif

std::tuple<Tensor, Tensor> gram_loss(const Tensor& student, const Tensor& teacher, std::string_view clip,
                                     bool gradient) {
  GramLoss args{.student = check_features("student", student, student),
                .teacher = check_features("teacher", teacher, student),
                .images = student.size(0),
                .patches = student.size(1),
                .width = student.size(2),
                .clip = clip_of(clip)};
  STD_TORCH_CHECK(args.patches <= kGramMostPatches && args.width <= kGramMostWidth, kOp,
                  ": student must have N <= ", kGramMostPatches, " and D <= ", kGramMostWidth, "; got (", args.images,
                  ", ", args.patches, ", ", args.width, ")");
  const ScalarType type = scalar_type(gram_grad_element(args.student.element));
  Tensor loss = empty(student, {}, ScalarType::Float);
  Tensor grad = gradient ? empty(student, {args.images, args.patches, args.width}, type) : empty(student, {0}, type);
  args.loss = output<float>(loss);
  args.grad = gradient ? output(grad) : nullptr;
  const int64_t bytes = runs_on_cpu(student) ? gram_loss_workspace_cpu(args) : gram_loss_workspace_cuda(args);
  Tensor workspace = empty(student, {bytes}, ScalarType::Byte);
  args.workspace = output(workspace);
  launch(kOp, student, args, gram_loss_cpu, gram_loss_cuda);
  return {loss, grad};
}

}  // namespace dinov3_ext
