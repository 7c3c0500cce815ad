// The Python module trackstar_kernels._C: the only file that knows pybind11.
//
// Arrays arrive as addresses and sizes that the Python side has checked, so this builds without torch's
// headers and one wheel serves every torch. Every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "scoring.h"

namespace py = pybind11;
using namespace trackstar;

namespace {

const std::pair<const char*, Isa> kLevels[] = {
    {"baseline", Isa::baseline}, {"x86-64-v3", Isa::v3}, {"x86-64-v4", Isa::v4}};

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const auto& [name, level] : kLevels) {
    if (isa_available(level)) names.emplace_back(name);
  }
  return names;
}

std::string isa_name() {
  for (const auto& [name, level] : kLevels) {
    if (level == isa()) return name;
  }
  throw std::logic_error("unnamed instruction set level");
}

void set_isa_by_name(const std::string& wanted) {
  for (const auto& [name, level] : kLevels) {
    if (wanted == name && isa_available(level)) return set_isa(level);
  }
  throw std::invalid_argument("isa must be one of available_isas(), got '" + wanted + "'");
}

void score_topk_at(uintptr_t queries, uintptr_t rows, const std::string& row_type, ptrdiff_t row_stride,
                   uintptr_t scales, size_t Q, size_t N, size_t L, size_t d, size_t k, bool largest,
                   int threads, uintptr_t scores, uintptr_t positions) {
  score_topk(reinterpret_cast<const float*>(queries), reinterpret_cast<const void*>(rows),
             row_type == "float16" ? RowType::float16 : RowType::float32, row_stride,
             reinterpret_cast<const float*>(scales), Q, N, L, d, k, largest, threads,
             reinterpret_cast<float*>(scores), reinterpret_cast<int64_t*>(positions));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of trackstar_kernels.";

  m.def("available_isas", &available_isas, "Instruction set levels that this machine can run, lowest first.");
  m.def("isa", &isa_name, "The level in force.");
  m.def("set_isa", &set_isa_by_name, py::arg("name"), "Put a level in force, for tests and benchmarks.");

  m.def("score_topk", &score_topk_at, py::arg("queries"), py::arg("rows"), py::arg("row_type"),
        py::arg("row_stride"), py::arg("scales"), py::arg("Q"), py::arg("N"), py::arg("L"), py::arg("d"),
        py::arg("k"), py::arg("largest"), py::arg("threads"), py::arg("scores"), py::arg("positions"),
        py::call_guard<py::gil_scoped_release>(), "See csrc/scoring.h.");
}
