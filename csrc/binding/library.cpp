// Every op of torch.ops.dinov3_ext: schema and implementations. Fakes and autograd are in dinov3_ext/ops/<op>.py.
#include <torch/csrc/stable/library.h>

#include "binding/ops.h"

STABLE_TORCH_LIBRARY(dinov3_ext, m) {
  m.def("sinkhorn_column_sums(Tensor logits, float temperature) -> (Tensor maxima, Tensor sums)");
  m.def("sinkhorn_finish(Tensor sums, Tensor shift) -> Tensor columns");
  m.def(
      "sinkhorn_row_sums(Tensor logits, Tensor previous, Tensor columns, float temperature, bool column_sums)"
      " -> (Tensor rows, Tensor sums)");
}

STABLE_TORCH_LIBRARY_IMPL(dinov3_ext, CPU, m) {
  m.impl("sinkhorn_column_sums", TORCH_BOX(&dinov3_ext::sinkhorn_column_sums));
  m.impl("sinkhorn_finish", TORCH_BOX(&dinov3_ext::sinkhorn_finish));
  m.impl("sinkhorn_row_sums", TORCH_BOX(&dinov3_ext::sinkhorn_row_sums));
}

// Registered in a build without nvcc too: a CUDA tensor then gets the sentence that says so.
STABLE_TORCH_LIBRARY_IMPL(dinov3_ext, CUDA, m) {
  m.impl("sinkhorn_column_sums", TORCH_BOX(&dinov3_ext::sinkhorn_column_sums));
  m.impl("sinkhorn_finish", TORCH_BOX(&dinov3_ext::sinkhorn_finish));
  m.impl("sinkhorn_row_sums", TORCH_BOX(&dinov3_ext::sinkhorn_row_sums));
}
