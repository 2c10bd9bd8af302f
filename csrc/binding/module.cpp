// The Python module dinov3_ext._C: what is not a tensor op. Importing it registers the ops (library.cpp).
#include <pybind11/pybind11.h>

#include "core/cpu_variant.h"
#include "core/cuda_status.h"
#include "ops/assignment_cross_entropy/assignment_cross_entropy_plan.h"
#include "ops/gram_loss/gram_loss_plan.h"
#include "ops/rope_attention/rope_attention_backward_plan.h"
#include "ops/rope_attention/rope_attention_plan.h"
#include "ops/sinkhorn_knopp/sinkhorn_knopp_plan.h"

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

dinov3_ext::Element element_of(const std::string& dtype) {
  using dinov3_ext::Element;
  return dtype == "bfloat16" ? Element::bfloat16 : dtype == "float16" ? Element::float16 : Element::float32;
}

py::dict sinkhorn_knopp_plan(const std::string& dtype, int64_t rows, int64_t prototypes) {
  if (rows < 0 || prototypes < 1) throw py::value_error("sinkhorn_knopp_plan: rows must be >= 0 and prototypes >= 1");
  const dinov3_ext::Element element = element_of(dtype);
  const int vector = element == dinov3_ext::Element::float32 ? 4 : 8;
  const int width = prototypes % vector ? 1 : vector;
  const dinov3_ext::SinkhornPlan plan = dinov3_ext::sinkhorn_plan(rows, prototypes, element, width);
  py::dict answer;
  answer["width"] = width;
  answer["columns"] = plan.columns;
  answer["tiles"] = plan.tiles;
  answer["kept"] = plan.kept;
  answer["shared_bytes"] = plan.shared_bytes;
  answer["splits"] = plan.splits;
  answer["ranges"] = plan.ranges;
  return answer;
}

py::dict assignment_cross_entropy_plan(int64_t crops, int64_t views, int64_t images, int64_t prototypes) {
  if (crops < 1 || views < 1 || images < 1 || prototypes < 1) {
    throw py::value_error("assignment_cross_entropy_plan: sizes must be >= 1");
  }
  const bool single = crops == 1 && views == 1;
  const dinov3_ext::CrossEntropyPlan plan = dinov3_ext::cross_entropy_plan(crops, views, images, prototypes);
  py::dict answer;
  answer["images"] = single ? dinov3_ext::kCrossEntropyImages : 1;
  answer["crops"] = single ? 1 : dinov3_ext::kCrossEntropyCrops;
  answer["views"] = single ? 1 : dinov3_ext::kCrossEntropyViews;
  answer["forward_blocks"] = plan.forward_blocks();
  answer["forward_ranges"] = plan.forward.ranges;
  answer["backward_blocks"] = plan.backward_blocks();
  answer["backward_ranges"] = plan.backward.ranges;
  return answer;
}

py::dict rope_attention_plan(const std::string& dtype, int head_width, int tokens, int architecture) {
  const dinov3_ext::Element element = element_of(dtype);  // float32 stands for all that have no kernel
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
  m.def("sinkhorn_knopp_plan", &sinkhorn_knopp_plan, py::arg("dtype"), py::arg("rows"), py::arg("prototypes"),
        "Its CUDA kernels for contiguous logits: columns, number and shared_bytes of the tiles of one rank alone, "
        "whether "
        "they are kept in shared memory; splits of the rows and ranges of the columns where ranks exchange.");
  m.def("assignment_cross_entropy_plan", &assignment_cross_entropy_plan, py::arg("crops"), py::arg("views"),
        py::arg("images"), py::arg("prototypes"),
        "Its CUDA kernels: images, crops and views of a block, blocks, ranges of the columns; forward and backward.");
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
