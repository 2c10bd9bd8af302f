// Gram anchoring: mean squared difference of the patches' cosine similarities, and the student's gradient with it.
// Torch-free: this header is all that the kernels and the binding share.
//
// With r[i] = 1 / max(|x[i]|, 1e-12) for the student's rows x, q[i] for the teacher's rows y, of one image:
//   S[i, j] = r[i] r[j] <x[i], x[j]>,  T[i, j] = q[i] q[j] <y[i], y[j]>,  d[i, j] = phi(S[i, j]) - psi(T[i, j])
//   loss    = sum over images, i, j of d[i, j]^2 / (images patches^2)
//   grad[i] = 4 / (images patches^2) r[i] (sum over j of d'[i, j] r[j] x[j] - t[i] r[i] x[i])
//   t[i]    = sum over j of d'[i, j] S[i, j];  0 where |x[i]| <= 1e-12: that row is divided by a constant
//   d'      = d, or with clip "both" 0 where S < 0 (the gradient passes at exactly 0)
//   phi     = max(., 0) with clip "both", else the identity;  psi = the identity with clip "none", else max(., 0)
// d[i, i] is 0 but for rows not longer than 1e-12: their S[i, i] is (|x[i]| / 1e-12)^2.
//
// Sums are fp32 in an order that depends on the shape alone: not on threads, not on the GPU. Offsets are int64.
#pragma once

#include <cstdint>

#include "core/element.h"
#include "core/parallel.h"

namespace dinov3_ext {

enum class GramClip : int { none, both, teacher };

inline constexpr float kGramSmallestNorm = 1e-12f;

// (images, patches, width), any strides, none of the sizes zero.
struct GramFeatures {
  const void* data;
  Element element;
  int64_t image_stride, row_stride, column_stride;  // in elements
};

struct GramLoss {
  GramFeatures student, teacher;  // their types may differ
  int64_t images, patches, width;
  GramClip clip;
  float* loss;      // out, one number
  void* grad;       // out (images, patches, width), contiguous, of type gram_grad_element(student); null: not wanted
  void* workspace;  // gram_loss_workspace_cpu or _cuda bytes, a multiple of 16 in address
};

// The gradient waits for its upstream factor, often the scale of an fp16 loss: unscaled it is too small for fp16.
inline Element gram_grad_element(Element student) { return student == Element::float16 ? Element::float32 : student; }

// Bytes of workspace; they depend on the sizes, the types and on whether the gradient is wanted (args.grad).
int64_t gram_loss_workspace_cpu(const GramLoss& args);
void gram_loss_cpu(const GramLoss& args, ParallelFor parallel_for);

// Launcher: enqueues on `stream` (a cudaStream_t), returns a cudaError_t as int, never waits.
int64_t gram_loss_workspace_cuda(const GramLoss& args);
int gram_loss_cuda(const GramLoss& args, void* stream);

}  // namespace dinov3_ext
