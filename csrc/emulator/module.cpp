// The Python module _emulator: settings, counters and reports. Importing it registers torch.ops.dinov3_ext_emulator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/architecture.h"
#include "emulator/runtime.h"

namespace py = pybind11;
using namespace dinov3_ext::emulator;

namespace {

void configure(uint64_t seed, const std::string& cp_async, bool whole_tiles, bool races, const std::string& products,
               int threads, int architecture) {
  if (cp_async != "late" && cp_async != "now") {
    throw py::value_error("configure: cp_async must be \"late\" or \"now\"; got '" + cp_async + "'");
  }
  if (products != "nearest" && products != "truncated") {
    throw py::value_error("configure: products must be \"nearest\" or \"truncated\"; got '" + products + "'");
  }
  if (threads < 1 || threads > 64) throw py::value_error("configure: threads must be 1 to 64");
  options = {seed, cp_async == "late", whole_tiles, races, products == "truncated", threads};
  dinov3_ext::emulated_architecture().store(architecture);
}

py::dict counters() {
  py::dict all;
  for (const auto& [kernel, of_kernel] : all_counters()) {
    py::dict one;
#define DINOV3_EXT_EMULATOR_ITEM(name) one[#name] = of_kernel.name;
    DINOV3_EXT_EMULATOR_COUNTERS(DINOV3_EXT_EMULATOR_ITEM)
#undef DINOV3_EXT_EMULATOR_ITEM
    all[py::str(kernel)] = one;
  }
  return all;
}

std::string name_of(const Site& site) {
  return std::string(site_file(site.where)) + ":" + std::to_string(site.where.line()) + ":" +
         std::to_string(site.where.column());
}

py::list sites() {
  py::list all;
  for (const SiteReached& one : all_sites()) {
    py::dict entry;
    entry["site"] = name_of(one.site);
    entry["word"] = one.site.word;
    entry["reached"] = one.site.reached;
    entry["kernels"] = one.kernels;
    all.append(entry);
  }
  return all;
}

void mutate(const py::object& site, const std::string& kernel, bool short_wait) {
  if (site.is_none()) return set_mutant(nullptr);
  const auto text = site.cast<std::string>();
  const size_t second = text.rfind(':'), first = second == std::string::npos ? second : text.rfind(':', second - 1);
  if (first == std::string::npos) throw py::value_error("mutate: site must be file:line:column; got '" + text + "'");
  const Mutant mutant{text.substr(0, first), uint32_t(std::stoul(text.substr(first + 1))),
                      uint32_t(std::stoul(text.substr(second + 1))), kernel, short_wait};
  set_mutant(&mutant);
}

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  m.doc() = "Runs the CUDA kernels of dinov3_ext on the CPU, one fiber per CUDA thread, and checks what they do.";
  m.def(
      "configure", &configure, py::kw_only(), py::arg("seed") = 0, py::arg("cp_async") = "late",
      py::arg("whole_tiles") = true, py::arg("races") = true, py::arg("products") = "nearest", py::arg("threads") = 1,
      py::arg("architecture") = 90,
      "Settings of every launch from now on; what is not given takes its default. seed: 0 runs fibers and blocks in "
      "order, another number in that random order. cp_async: \"late\" delivers copies at their wait, \"now\" at once. "
      "products: how tensor-core sums round, \"nearest\" or \"truncated\". architecture: of the GPU that launchers "
      "see.");
  m.def("architecture", [] { return dinov3_ext::emulated_architecture().load(); }, "As configured.");
  m.def("counters", &counters, "{kernel: {counter: sum over its launches}} since reset_counters().");
  m.def("reset_counters", &reset_counters, "Forgets counters and sites.");
  m.def("last_report", &last_report, "Text of the last finding.");
  m.def("sites", &sites,
        "Calls of block_barrier, warp_barrier and copy_async_wait reached since reset_counters(): a list of {site: "
        "file:line:column, word, reached, kernels}.");
  m.def("mutate", &mutate, py::arg("site"), py::arg("kernel") = "", py::arg("short_wait") = false,
        "Makes the call at one site do nothing, in kernels whose name contains `kernel`; short_wait: "
        "a copy_async_wait there waits for one group fewer instead. None: no mutant.");
}
