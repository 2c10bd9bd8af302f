// Every op of torch.ops.dinov3_ext: schema and implementations. Fakes and autograd are in dinov3_ext/ops/<op>.py.
#include <torch/csrc/stable/library.h>

#include "binding/ops.h"

// The namespace is dinov3_ext, in the emulator's library dinov3_ext_emulator (CMakeLists.txt); through macros of our
// own, so that its name is expanded before torch's macros paste it.
#define DINOV3_EXT_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define DINOV3_EXT_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

#if defined(DINOV3_EXT_EMULATOR)  // every call is an operation of its own: what it announces is forgotten behind it
#include "emulator/memory.h"
#define DINOV3_EXT_BOX(function) TORCH_BOX(&dinov3_ext::emulator::AsOperation<function>::call)
#else
#define DINOV3_EXT_BOX(function) TORCH_BOX(function)
#endif

DINOV3_EXT_LIBRARY(DINOV3_EXT_OPS, m) {
  m.def("gram_loss(Tensor student, Tensor teacher, str clip, bool gradient) -> (Tensor loss, Tensor grad)");
  m.def("sinkhorn_potentials(Tensor logits, float temperature, int iterations) -> (Tensor rows, Tensor columns)");
  m.def("sinkhorn_column_sums(Tensor logits, float temperature) -> (Tensor maxima, Tensor sums)");
  m.def("sinkhorn_finish(Tensor sums, Tensor shift) -> Tensor columns");
  m.def(
      "sinkhorn_row_sums(Tensor logits, Tensor previous, Tensor columns, float temperature, bool column_sums)"
      " -> (Tensor rows, Tensor sums)");
  m.def(
      "assignment_cross_entropy(Tensor student, Tensor teacher, Tensor rows, Tensor columns, float student_temperature,"
      " float teacher_temperature, Tensor? weight) -> (Tensor losses, Tensor log_sums)");
  m.def(
      "assignment_cross_entropy_backward(Tensor grad, Tensor student, Tensor teacher, Tensor rows, Tensor columns,"
      " Tensor log_sums, float student_temperature, float teacher_temperature, Tensor? weight) -> Tensor gradient");
  m.def(
      "assignment_cross_entropy_backward_(Tensor grad, Tensor(a!) student, Tensor teacher, Tensor rows, Tensor columns,"
      " Tensor log_sums, float student_temperature, float teacher_temperature, Tensor? weight) -> ()");
  m.def("rope_rotate(Tensor qkv, Tensor rope, Tensor sequences, int[] groups) -> Tensor");
  m.def("rope_rotate_backward(Tensor grad, Tensor rope, Tensor sequences, int[] groups) -> Tensor");
  m.def(
      "rope_attention(Tensor qkv, Tensor rope, Tensor sequences, int[] groups, float scale)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "rope_attention_backward(Tensor grad, Tensor qkv, Tensor rope, Tensor sequences, int[] groups, Tensor out,"
      " Tensor lse, float scale) -> Tensor");
}

#define DINOV3_EXT_IMPL(name) m.impl(#name, DINOV3_EXT_BOX(&dinov3_ext::name))
#define DINOV3_EXT_IMPLS(key)                            \
  DINOV3_EXT_LIBRARY_IMPL(DINOV3_EXT_OPS, key, m) {      \
    DINOV3_EXT_IMPL(gram_loss);                          \
    DINOV3_EXT_IMPL(sinkhorn_potentials);                \
    DINOV3_EXT_IMPL(sinkhorn_column_sums);               \
    DINOV3_EXT_IMPL(sinkhorn_finish);                    \
    DINOV3_EXT_IMPL(sinkhorn_row_sums);                  \
    DINOV3_EXT_IMPL(assignment_cross_entropy);           \
    DINOV3_EXT_IMPL(assignment_cross_entropy_backward);  \
    DINOV3_EXT_IMPL(assignment_cross_entropy_backward_); \
    DINOV3_EXT_IMPL(rope_rotate);                        \
    DINOV3_EXT_IMPL(rope_rotate_backward);               \
    DINOV3_EXT_IMPL(rope_attention);                     \
    DINOV3_EXT_IMPL(rope_attention_backward);            \
  }

DINOV3_EXT_IMPLS(CPU)
// Registered in a build without nvcc too: a CUDA tensor then gets the sentence that says so.
DINOV3_EXT_IMPLS(CUDA)
