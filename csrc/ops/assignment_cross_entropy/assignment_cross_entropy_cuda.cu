// Launchers of the cross-entropy kernels: grid, tile and vector width from shape and layout, nothing from the device.
#include "core/launch.cuh"
#include "ops/assignment_cross_entropy/assignment_cross_entropy_cuda.cuh"

namespace dinov3_ext {
namespace {

using cross_entropy::kCrops;
using cross_entropy::kImages;
using cross_entropy::kThreads;
using cross_entropy::kViews;
using cross_entropy::kWarps;
using cross_entropy::Ranges;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

CrossEntropyPlan plan_of(const AssignmentProblem& problem) {
  return cross_entropy_plan(problem.student.crops, problem.teacher.crops, problem.images, problem.prototypes);
}

bool aligned(const void* data, int64_t crop_stride, int64_t row_stride, int64_t width) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && crop_stride % width == 0 && row_stride % width == 0;
}
bool aligned(const AssignmentProblem& problem, int64_t width) {
  const AssignmentLogits &student = problem.student, &teacher = problem.teacher;
  return problem.prototypes % width == 0 && aligned(problem.columns, 0, 0, width) &&
         aligned(student.data, student.crop_stride, student.row_stride, width) &&
         aligned(teacher.data, teacher.crop_stride, teacher.row_stride, width);
}

// Calls launch<element, width>() -> status; width: 16 bytes, or 1 where a row does not allow that. also_aligned: of
// further tensors, given the width.
template <class Aligned, class Launch>
int with_width(const AssignmentProblem& problem, Aligned also_aligned, Launch launch) {
  auto choose = [&]<Element E>() {
    constexpr int width = kPerVector<E>;
    return aligned(problem, width) && also_aligned(width) ? launch.template operator()<E, width>()
                                                          : launch.template operator()<E, 1>();
  };
  switch (problem.element) {
    case Element::float32: return choose.template operator()<Element::float32>();
    case Element::bfloat16: return choose.template operator()<Element::bfloat16>();
    default: return choose.template operator()<Element::float16>();
  }
}

}  // namespace

int64_t assignment_cross_entropy_workspace_cuda(int64_t crops, int64_t views, int64_t images, int64_t prototypes) {
  const int64_t ranges = cross_entropy_plan(crops, views, images, prototypes).forward.ranges;
  return images * (ranges * (crops * (2 + views) + views) + crops * views);
}

int assignment_cross_entropy_cuda(const AssignmentCrossEntropy& args, void* stream) {
  const AssignmentProblem& problem = args.problem;
  const int64_t crops = problem.student.crops, views = problem.teacher.crops, images = problem.images;
  const CrossEntropyPlan plan = plan_of(problem);
  const Ranges& work = plan.forward;
  const auto anything = [](int64_t) { return true; };
  int status = with_width(problem, anything, [&]<Element E, int N>() {
    auto run = [&]<int Images, int Crops, int Views>() {
      const Shape shape{.x = plan.forward_blocks(),
                        .threads = kThreads,
                        .shared_bytes = Images * (Crops * (2 + Views) + Views) * kWarps * 4};
      return launch<cross_entropy::forward_partial<E, N, Images, Crops, Views>>(shape, stream, args, work);
    };
    return crops == 1 && views == 1 ? run.template operator()<kImages, 1, 1>()
                                    : run.template operator()<1, kCrops, kViews>();
  });
  if (status) return status;
  status = launch<cross_entropy::forward_rows>(Shape{.x = divide_up(crops * images, kThreads), .threads = kThreads},
                                               stream, args, work.ranges);
  if (status) return status;
  return launch<cross_entropy::forward_sum>(Shape{.x = crops * views, .threads = kThreads, .shared_bytes = kWarps * 4},
                                            stream, args, work.ranges);
}

int assignment_cross_entropy_backward_cuda(const AssignmentCrossEntropyBackward& args, void* stream) {
  const AssignmentProblem& problem = args.problem;
  const int64_t crops = problem.student.crops, views = problem.teacher.crops;
  if (crops == 0) return 0;
  const CrossEntropyPlan plan = plan_of(problem);
  const Ranges& work = plan.backward;
  const auto gradient_aligned = [&](int64_t width) {
    return aligned(args.gradient, args.gradient_crop_stride, args.gradient_row_stride, width);
  };
  return with_width(problem, gradient_aligned, [&]<Element E, int N>() {
    auto run = [&]<int Images, int Crops, int Views>() {
      const Shape shape{
          .x = plan.backward_blocks(), .threads = kThreads, .shared_bytes = int(Images * crops * (3 + views) * 4)};
      return launch<cross_entropy::backward<E, N, Images, Crops, Views>>(shape, stream, args, work);
    };
    if (views < 1 || views > kViews) return run.template operator()<1, 1, 0>();
    return crops == 1 && views == 1 ? run.template operator()<kImages, 1, 1>()
                                    : run.template operator()<1, kCrops, kViews>();
  });
}

}  // namespace dinov3_ext
