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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of trackstar_kernels.";

  m.def("available_isas", &available_isas, "Instruction set levels that this machine can run, lowest first.");
  m.def("isa", &isa_name, "The level in force.");
  m.def("set_isa", &set_isa_by_name, py::arg("name"), "Put a level in force, for tests and benchmarks.");
}
