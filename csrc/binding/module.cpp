// The Python module dinov3_ext._C: what is not a tensor op. Importing it registers the ops (library.cpp).
#include <pybind11/pybind11.h>

#include "core/cpu_variant.h"
#include "core/cuda_status.h"
#include "ops/gram_loss/gram_loss_plan.h"
#include "ops/rope_attention/rope_attention_backward_plan.h"
#include "ops/rope_attention/rope_attention_plan.h"

namespace py = pybind11;

namespace {

using dinov3_ext::CpuVariant;

constexpr const char* kVariants[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

py::dict build_info() {
  py::dict info;
  info["version"] = DINOV3_EXT_VERSION;
  info["source_digest"] = DINOV3_EXT_SOURCE_DIGEST;
  info["torch_headers"] = DINOV3_EXT_TORCH_HEADERS;
  info["compiler"] = DINOV3_EXT_COMPILER;
  const int cuda = dinov3_ext::cuda_runtime_version();
  info["cuda"] = cuda ? py::object(py::int_(cuda)) : py::object(py::none());
  info["cuda_architectures"] = DINOV3_EXT_CUDA_ARCHITECTURES;
  return info;
}

const char* cpu_variant() { return kVariants[int(dinov3_ext::cpu_variant().load())]; }

py::list cpu_variants() {
  py::list names;
  for (int i = 0; i <= int(dinov3_ext::best_cpu_variant()); ++i) names.append(kVariants[i]);
  return names;
}

void set_cpu_variant(const std::string& name) {
  for (int i = 0; i <= int(dinov3_ext::best_cpu_variant()); ++i) {
    if (name == kVariants[i]) return dinov3_ext::cpu_variant().store(CpuVariant(i));
  }
  throw py::value_error("set_cpu_variant: name must be one that this CPU runs (cpu_variants()); got '" + name + "'");
}

py::dict gram_loss_plan(int64_t images, int64_t patches, int64_t width, int parts, bool gradient) {
  if (images < 1 || patches < 1 || width < 1 || parts < 1 || parts > 2) {
    throw py::value_error("gram_loss_plan: sizes must be >= 1 and parts 1 or 2");
  }
  const dinov3_ext::GramPlan plan = dinov3_ext::gram_plan(images, patches, width, parts, gradient);
  py::dict answer;
  answer["tile"] = plan.tile;
  answer["tiles"] = plan.tiles;
  answer["chunk"] = plan.chunk;
  answer["entries_bytes"] = plan.entries_bytes;
  answer["workspace_bytes"] = plan.workspace_bytes();
  return answer;
}

py::dict rope_attention_plan(const std::string& dtype, int head_width, int tokens, int architecture) {
  using dinov3_ext::Element;
  const Element element = dtype == "bfloat16"  ? Element::bfloat16
                          : dtype == "float16" ? Element::float16
                                               : Element::float32;  // stands for all that have no kernel
  constexpr const char* kPaths[] = {"resident", "streaming", "composed"};
  const dinov3_ext::AttentionPlan plan = dinov3_ext::rope_attention_plan(element, head_width, tokens, architecture);
  py::dict answer;
  answer["path"] = kPaths[int(plan.path)];
  answer["rows"] = plan.rows;
  answer["warps"] = plan.warps;
  answer["shared_bytes"] = plan.shared_bytes;
  answer["pairs"] = plan.pairs;
  return answer;
}

py::dict rope_attention_backward_plan(int head_width, int tokens, int architecture) {
  const dinov3_ext::BackwardTiling tiling = dinov3_ext::backward_tiling(head_width, tokens, architecture);
  py::dict answer;
  answer["path"] = tiling.resident ? "resident" : "streaming";
  answer["rows"] = tiling.rows;
  answer["step"] = tiling.step;
  answer["warps"] = tiling.warps;
  answer["shared_bytes"] = tiling.shared_bytes;
  return answer;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native half of dinov3_ext. Importing it registers torch.ops.dinov3_ext.";
  m.def("build_info", &build_info, "What was built: version, source digest, compiler, CUDA runtime, architectures.");
  m.def("cpu_variant", &cpu_variant, "Instruction set the CPU kernels use.");
  m.def("cpu_variants", &cpu_variants, "Instruction sets this CPU runs, slowest first.");
  m.def("set_cpu_variant", &set_cpu_variant, py::arg("name"), "Changes the instruction set (for tests), process-wide.");
  m.def("gram_loss_plan", &gram_loss_plan, py::arg("images"), py::arg("patches"), py::arg("width"), py::arg("parts"),
        py::arg("gradient"), "Tiles and workspace of the CUDA kernels of gram_loss.");
  m.def("rope_attention_composed_tokens", &dinov3_ext::composed_tokens, py::arg("architecture"),
        "Tokens of a sequence from which on rope_attention takes PyTorch's attention.");
  m.def(
      "rope_attention_plan", &rope_attention_plan, py::arg("dtype"), py::arg("head_width"), py::arg("tokens"),
      py::arg("architecture"),
      "What rope_attention does on a GPU with sequences of `tokens` alone: path (resident, streaming, composed), rows, "
      "warps and shared_bytes of a block, (sequence, head) pairs in one.");
  m.def(
      "rope_attention_backward_plan", &rope_attention_backward_plan, py::arg("head_width"), py::arg("tokens"),
      py::arg("architecture"),
      "Kernels of its backward for E = 64 or 128: path (resident, streaming), rows, warps and shared_bytes of a block, "
      "keys or queries of one step.");
}
