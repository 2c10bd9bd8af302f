// Kernels of the cross-entropy against Sinkhorn-Knopp assignments. Limited by memory.
//
// Traffic for C = A = 1 in 16 bits: forward reads each student and teacher logit once (4 bytes a pair), backward reads
// both again and writes the gradient (6). The column potentials come from the L2 cache, 4 bytes a column, which is as
// much as the logits themselves: a block takes kImages images at once, so that one reading serves them all (5 bytes a
// pair through L2 instead of 8, 7 instead of 10 in backward).
// For C crops against A views of an image one thread holds the probabilities of its columns and goes through the crops,
// so a teacher logit comes from memory once, whatever C is.
//
// A block has its images and a range of columns; the number of ranges follows from the shape alone. Within a range a
// thread takes N columns (16 bytes), then those kThreads N further on. Partial sums of the ranges go to a workspace and
// are added in the order of their index: no atomics.
#pragma once

#include <cmath>

#include "core/block_reduce.cuh"
#include "core/element.cuh"
#include "core/inverse.cuh"
#include "core/log_sum.cuh"
#include "core/primitives.cuh"
#include "ops/assignment_cross_entropy/assignment_cross_entropy.h"
#include "ops/assignment_cross_entropy/assignment_cross_entropy_plan.h"

namespace dinov3_ext {

namespace cross_entropy {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr int kThreads = kCrossEntropyThreads;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kImages = kCrossEntropyImages;
inline constexpr int kCrops = kCrossEntropyCrops, kViews = kCrossEntropyViews;
using Ranges = CrossEntropyRanges;

// Where the forward kernel's blocks leave their results: per range maxima (C, B) of the student's logits, sums (C, B)
// relative to them, dots (C, A, B) of p and the logits less the maximum, masses (A, B) of p; behind all ranges the
// weighted losses of single rows (C, A, B).
struct Workspace {
  float* data;
  int64_t crops, views, images, ranges;

  // Vector `index` of a range, one number for each image.
  __device__ __forceinline__ float* vector(int64_t range, int64_t index, int64_t image) const {
    return data + (range * (2 * crops + crops * views + views) + index) * images + image;
  }
  __device__ __forceinline__ float* maximum(int64_t range, int64_t crop, int64_t image) const {
    return vector(range, crop, image);
  }
  __device__ __forceinline__ float* sum(int64_t range, int64_t crop, int64_t image) const {
    return vector(range, crops + crop, image);
  }
  __device__ __forceinline__ float* dot(int64_t range, int64_t crop, int64_t view, int64_t image) const {
    return vector(range, 2 * crops + crop * views + view, image);
  }
  __device__ __forceinline__ float* mass(int64_t range, int64_t view, int64_t image) const {
    return vector(range, 2 * crops + crops * views + view, image);
  }
  __device__ __forceinline__ float* loss(int64_t crop, int64_t view, int64_t image) const {
    return vector(ranges, crop * views + view, image);
  }
};

__device__ __forceinline__ Workspace workspace_of(const AssignmentCrossEntropy& args, int64_t ranges) {
  return {args.workspace, args.problem.student.crops, args.problem.teacher.crops, args.problem.images, ranges};
}

template <Element E>
__device__ __forceinline__ const typename Storage<E>::Type* row_of(const AssignmentLogits& logits, int64_t crop,
                                                                   int64_t image) {
  return static_cast<const typename Storage<E>::Type*>(logits.data) + crop * logits.crop_stride +
         image * logits.row_stride;
}

__device__ __forceinline__ float weight_of(const AssignmentProblem& problem, int64_t image) {
  return problem.weight ? load_global(problem.weight + image) : 1.f / float(problem.images);
}

// p of N columns.
template <Element E, int N>
__device__ __forceinline__ void probabilities(const typename Packed<E, N>::Type& logits, const float (&column)[N],
                                              float row, const Inverse& temperature, float (&p)[N]) {
  float x[N];
  widen_packed<E, N>(logits, x);
#pragma unroll
  for (int i = 0; i < N; ++i) p[i] = exp2_approx(divide_add(x[i], temperature, column[i], row) * kLog2E);
}

// One student row against Views rows of p. Each dot is a sum of p (x - maximum), never of p x: the loss, some
// mass log(sum) - dot / temperature, is then a sum of small numbers, whatever is added to all logits of a row.
template <int Views>
struct RowState {
  LogSum log_sum;
  float dot[Views] = {};

  // mass: sums of p before these N columns.
  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N], const float (&p)[Views][N], const float (&mass)[Views],
                                      float scale) {
    const float before = log_sum.maximum;
    log_sum.add(x, scale);
#pragma unroll
    for (int a = 0; a < Views; ++a) {
      dot[a] = fmaf(mass[a], before - log_sum.maximum, dot[a]);
#pragma unroll
      for (int i = 0; i < N; ++i) dot[a] = fmaf(p[a][i], x[i] - log_sum.maximum, dot[a]);
    }
  }

  // mass: of this lane.
  __device__ __forceinline__ void reduce_over_warp(const float (&mass)[Views], float scale) {
    const float before = log_sum.maximum;
    log_sum.reduce_over_warp(scale);
#pragma unroll
    for (int a = 0; a < Views; ++a) {
      dot[a] = warp_reduce<Add>(fmaf(mass[a], before - log_sum.maximum, dot[a]));
    }
  }
};

// Blocks: ((Images images, range), tile). A tile: up to Crops crops against up to Views views.
// Shared memory: Images (Crops (2 + Views) + Views) numbers for each warp.
template <Element E, int N, int Images, int Crops, int Views>
__global__ void __launch_bounds__(kThreads) forward_partial(AssignmentCrossEntropy args, Ranges work) {
  const AssignmentProblem& problem = args.problem;
  const uint32_t tiles = uint32_t(work.crop_tiles * work.view_tiles), block = uint32_t(block_index<0>());
  const uint32_t tile = block % tiles, range = block / tiles % uint32_t(work.ranges);
  const int64_t first_image = int64_t(block / tiles / uint32_t(work.ranges)) * Images;
  const int64_t first_crop = int64_t(tile % uint32_t(work.crop_tiles)) * Crops;
  const int64_t first_view = int64_t(tile / uint32_t(work.crop_tiles)) * Views;
  const int64_t images = problem.images - first_image, crops = problem.student.crops - first_crop;
  const int64_t views = problem.teacher.crops - first_view;

  const auto* student = row_of<E>(problem.student, first_crop, first_image);
  const auto* teacher = row_of<E>(problem.teacher, first_view, first_image);
  float row[Images][Views];
#pragma unroll
  for (int b = 0; b < Images; ++b) {
#pragma unroll
    for (int a = 0; a < Views; ++a) {
      row[b][a] = b < images && a < views
                      ? load_global(problem.rows + (first_view + a) * problem.images + first_image + b)
                      : 0.f;
    }
  }

  RowState<Views> state[Images][Crops];
  float mass[Images][Views] = {};
  const int64_t first = range * work.columns, behind = first + work.columns;
  const int64_t last = behind < problem.prototypes ? behind : problem.prototypes;
  for (int64_t k = first + int64_t(thread_index()) * N; k < last; k += kThreads * N) {
    // All loads first, so that they are under way together.
    typename Packed<E, N>::Type logits[Images][Crops], targets[Images][Views];
    float column[N];
#pragma unroll
    for (int b = 0; b < Images; ++b) {
      if (b < images) {
#pragma unroll
        for (int c = 0; c < Crops; ++c) {
          const auto* from = student + c * problem.student.crop_stride + b * problem.student.row_stride;
          if (c < crops) logits[b][c] = load_packed<E, N, true>(from + k);
        }
#pragma unroll
        for (int a = 0; a < Views; ++a) {
          const auto* from = teacher + a * problem.teacher.crop_stride + b * problem.teacher.row_stride;
          if (a < views) targets[b][a] = load_packed<E, N>(from + k);
        }
      }
    }
    load_floats<N>(problem.columns + k, column);
#pragma unroll
    for (int b = 0; b < Images; ++b) {
      if (b < images) {
        float p[Views][N] = {};
#pragma unroll
        for (int a = 0; a < Views; ++a) {
          if (a < views) probabilities<E, N>(targets[b][a], column, row[b][a], problem.teacher_inverse, p[a]);
        }
#pragma unroll
        for (int c = 0; c < Crops; ++c) {
          if (c < crops) {
            float x[N];
            widen_packed<E, N>(logits[b][c], x);
            state[b][c].add(x, p, mass[b], problem.student_scale);
          }
        }
#pragma unroll
        for (int a = 0; a < Views; ++a) {
#pragma unroll
          for (int i = 0; i < N; ++i) mass[b][a] += p[a][i];
        }
      }
    }
  }

  // The numbers of each warp: for a crop its maximum, sum and dots, behind all crops the masses. Then one thread for
  // each of the block's numbers but the maxima.
  constexpr int kNumbers = Crops * (2 + Views) + Views;
  const auto scratch = [](int warp, int b, int c, int number) {
    return shared_base() + 4u * uint32_t((warp * Images + b) * kNumbers + c * (2 + Views) + number);
  };
#pragma unroll
  for (int b = 0; b < Images; ++b) {
#pragma unroll
    for (int c = 0; c < Crops; ++c) {
      state[b][c].reduce_over_warp(mass[b], problem.student_scale);
      if (lane_index() == 0) {
        store_shared(scratch(warp_index(), b, c, 0), state[b][c].log_sum.maximum);
        store_shared(scratch(warp_index(), b, c, 1), state[b][c].log_sum.sum);
#pragma unroll
        for (int a = 0; a < Views; ++a) store_shared(scratch(warp_index(), b, c, 2 + a), state[b][c].dot[a]);
      }
    }
#pragma unroll
    for (int a = 0; a < Views; ++a) {
      const float sum = warp_reduce<Add>(mass[b][a]);
      if (lane_index() == 0) store_shared(scratch(warp_index(), b, Crops, a), sum);
    }
  }
  block_barrier();
  const int number = thread_index() % (1 + Views), pair = thread_index() / (1 + Views);
  const int c = pair % (Crops + 1), b = pair / (Crops + 1), a = number - 1;
  if (b >= Images || b >= images || a >= views) return;
  const Workspace workspace = workspace_of(args, work.ranges);
  const int64_t crop = first_crop + c, view = first_view + a, image = first_image + b;
  const auto of_warp = [&](int warp, int c, int number) { return load_shared<float>(scratch(warp, b, c, number)); };
  if (c == Crops) {
    if (a < 0 || first_crop > 0) return;
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += of_warp(warp, Crops, a);
    store_global(workspace.mass(range, view, image), sum);
    return;
  }
  if (c >= crops) return;
  LogSum total;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    LogSum one;
    one.maximum = of_warp(warp, c, 0), one.sum = of_warp(warp, c, 1);
    total.merge(one, problem.student_scale);
  }
  if (a >= 0) {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += fmaf(of_warp(warp, Crops, a), of_warp(warp, c, 0) - total.maximum, of_warp(warp, c, 2 + a));
    }
    store_global(workspace.dot(range, crop, view, image), sum);
  } else if (first_view == 0) {
    store_global(workspace.maximum(range, crop, image), total.maximum);
    store_global(workspace.sum(range, crop, image), total.sum);
  }
}

// One thread per student row: the ranges in order; the row's logarithm and its weighted losses.
__global__ void __launch_bounds__(kThreads) forward_rows(AssignmentCrossEntropy args, int64_t ranges) {
  const AssignmentProblem& problem = args.problem;
  const Workspace workspace = workspace_of(args, ranges);
  const int64_t index = block_index<0>() * kThreads + thread_index();
  if (index >= problem.student.crops * problem.images) return;
  const int64_t crop = index / problem.images, image = index % problem.images;
  LogSum total;
  for (int64_t range = 0; range < ranges; ++range) {
    LogSum one;
    one.maximum = load_global(workspace.maximum(range, crop, image));
    one.sum = load_global(workspace.sum(range, crop, image));
    total.merge(one, problem.student_scale);
  }
  const Inverse& inverse = problem.student_inverse;
  const float log_sum = logf(total.sum);  // relative to the maximum
  store_global(args.log_sums + index,
               double(total.maximum) * (double(inverse.large) + double(inverse.small)) + double(log_sum));
  const float weight = weight_of(problem, image);
  for (int64_t view = 0; view < problem.teacher.crops; ++view) {
    float dot = 0.f, mass = 0.f;
    for (int64_t range = 0; range < ranges; ++range) {
      const float one = load_global(workspace.mass(range, view, image));
      const float above = load_global(workspace.maximum(range, crop, image)) - total.maximum;
      dot += fmaf(one, above, load_global(workspace.dot(range, crop, view, image)));
      mass += one;
    }
    store_global(workspace.loss(crop, view, image), weight * (mass * log_sum - dot * nearest(inverse)));
  }
}

// One block per pair of crop and view: the sum over images. No images: zero.
__global__ void __launch_bounds__(kThreads) forward_sum(AssignmentCrossEntropy args, int64_t ranges) {
  const Workspace workspace = workspace_of(args, ranges);
  const float* losses = workspace.loss(0, 0, 0) + block_index<0>() * workspace.images;
  float sum = 0.f;
#pragma unroll 4
  for (int64_t image = thread_index(); image < workspace.images; image += kThreads) sum += load_global(losses + image);
  sum = block_reduce<Add, kThreads>(sum, shared_base());
  if (thread_index() == 0) store_global(args.losses + block_index<0>(), sum);
}

// Blocks: (Images images, range). Crops: taken together, so that their loads are under way at once (a store might
// overwrite what follows it, as far as the compiler knows). Views: 1 or 2, held in registers for all crops; 0: any
// number, read and computed again for every crop.
// Shared memory, per image and crop: the sum of its factors, the logarithm of its row in two parts, a factor for
// each view.
template <Element E, int N, int Images, int Crops, int Views>
__global__ void __launch_bounds__(kThreads, 2) backward(AssignmentCrossEntropyBackward args, Ranges work) {
  static_assert(Images == 1 || Crops == 1);  // several images: for one crop alone, so `p` serves one after another
  const AssignmentProblem& problem = args.problem;
  const int64_t first_image = int64_t(uint32_t(block_index<0>()) / uint32_t(work.ranges)) * Images;
  const int64_t range = uint32_t(block_index<0>()) % uint32_t(work.ranges);
  const int crops = int(problem.student.crops), views = int(problem.teacher.crops);
  const int images = problem.images - first_image < Images ? int(problem.images - first_image) : Images;
  const auto factors = [crops](int b, int crop, int number) {
    return shared_base() + 4u * uint32_t((number * Images + b) * crops + crop);
  };
  for (int index = thread_index(); index < images * crops; index += kThreads) {
    const int b = index / crops, c = index % crops;
    const float unit = weight_of(problem, first_image + b) * nearest(problem.student_inverse);
    float total = 0.f;
    for (int a = 0; a < views; ++a) {
      const float factor = unit * load_global(args.grad + int64_t(c) * views + a);
      store_shared(factors(b, c, 3 + a), factor);
      total += factor;
    }
    store_shared(factors(b, c, 0), total);
    const double log_sum = load_global(args.log_sums + c * problem.images + first_image + b);
    const float large = float(log_sum);
    store_shared(factors(b, c, 1), large);
    store_shared(factors(b, c, 2), float(log_sum - double(large)));
  }
  block_barrier();

  const auto* student = row_of<E>(problem.student, 0, first_image);
  const auto* teacher = row_of<E>(problem.teacher, 0, first_image);
  auto* gradient = static_cast<typename Storage<E>::Type*>(args.gradient) + first_image * args.gradient_row_stride;
  const auto row = [&](int b, int view) { return load_global(problem.rows + view * problem.images + first_image + b); };
  const auto target = [&](int b, int view) {
    return teacher + view * problem.teacher.crop_stride + b * problem.teacher.row_stride;
  };
  constexpr int kHeld = Views ? Views : 1;
  const int64_t first = range * work.columns, behind = first + work.columns;
  const int64_t last = behind < problem.prototypes ? behind : problem.prototypes;
  for (int64_t k = first + int64_t(thread_index()) * N; k < last; k += kThreads * N) {
    typename Packed<E, N>::Type logits[Images][Crops], targets[Images][kHeld];
    float column[N], p[kHeld][N] = {};
    load_floats<N>(problem.columns + k, column);
    if constexpr (Views > 0) {
#pragma unroll
      for (int b = 0; b < Images; ++b) {
#pragma unroll
        for (int a = 0; a < Views; ++a) {
          if (b < images && a < views) targets[b][a] = load_packed<E, N>(target(b, a) + k);
        }
      }
    }
    for (int first_crop = 0; first_crop < crops; first_crop += Crops) {
#pragma unroll
      for (int b = 0; b < Images; ++b) {
#pragma unroll
        for (int c = 0; c < Crops; ++c) {
          const int crop = first_crop + c;
          const auto* from = student + crop * problem.student.crop_stride + b * problem.student.row_stride;
          if (b < images && crop < crops) logits[b][c] = load_packed<E, N, true>(from + k);
        }
      }
#pragma unroll
      for (int b = 0; b < Images; ++b) {
        if constexpr (Views > 0) {
          if (first_crop == 0) {  // here, so that the first crops' loads are under way too
#pragma unroll
            for (int a = 0; a < Views; ++a) {
              if (b < images && a < views) {
                probabilities<E, N>(targets[b][a], column, row(b, a), problem.teacher_inverse, p[a]);
              }
            }
          }
        }
#pragma unroll
        for (int c = 0; c < Crops; ++c) {
          const int crop = first_crop + c;
          if (b < images && crop < crops) {
            float x[N], result[N];
            widen_packed<E, N>(logits[b][c], x);
            const float total = load_shared<float>(factors(b, crop, 0));
            const float large = load_shared<float>(factors(b, crop, 1));
            const float small = load_shared<float>(factors(b, crop, 2));
#pragma unroll
            for (int i = 0; i < N; ++i) {
              result[i] = total * exp2_approx(divide_add(x[i], problem.student_inverse, -large, -small) * kLog2E);
            }
            if constexpr (Views > 0) {
#pragma unroll
              for (int a = 0; a < Views; ++a) {
                if (a < views) {
                  const float factor = load_shared<float>(factors(b, crop, 3 + a));
#pragma unroll
                  for (int i = 0; i < N; ++i) result[i] = fmaf(-factor, p[a][i], result[i]);
                }
              }
            } else {
              for (int a = 0; a < views; ++a) {
                const float factor = load_shared<float>(factors(b, crop, 3 + a));
                targets[b][0] = load_packed<E, N>(target(b, a) + k);
                probabilities<E, N>(targets[b][0], column, row(b, a), problem.teacher_inverse, p[0]);
#pragma unroll
                for (int i = 0; i < N; ++i) result[i] = fmaf(-factor, p[0][i], result[i]);
              }
            }
            store_elements<E, N>(gradient + crop * args.gradient_crop_stride + b * args.gradient_row_stride + k,
                                 result);
          }
        }
      }
    }
  }
}

}  // namespace cross_entropy
}  // namespace dinov3_ext
