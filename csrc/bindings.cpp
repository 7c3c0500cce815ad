// The Python module trackstar_kernels._C: the only file that knows pybind11.
//
// Arrays arrive as addresses and sizes that the Python side has checked, so this builds without torch's
// headers and one wheel serves every torch. Every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "gradient.h"
#include "scoring.h"

namespace py = pybind11;
using namespace trackstar;

namespace {

#ifdef __aarch64__
constexpr const char* kBaseline = "neon";
#else
constexpr const char* kBaseline = "baseline";
#endif
const std::pair<const char*, Isa> kLevels[] = {{kBaseline, Isa::baseline},    {"x86-64-v3", Isa::v3},
                                               {"avx-vnni", Isa::v3_vnni},    {"x86-64-v4", Isa::v4},
                                               {"avx512-vnni", Isa::v4_vnni}, {"avx512-bf16", Isa::v4_bf16}};

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

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Element element_of(const std::string& name) {
  if (name == "float32") return Element::float32;
  if (name == "bfloat16") return Element::bfloat16;
  if (name == "float16") return Element::float16;
  throw std::invalid_argument("element must be float32, bfloat16 or float16, got '" + name + "'");
}

void project_gradients_at(std::int64_t batch, std::int64_t in_features, std::int64_t out_features,
                          std::int64_t rank, std::int64_t q, std::int64_t p, const std::string& element,
                          std::uintptr_t activations, std::uintptr_t output_grads, std::uintptr_t offsets,
                          std::uintptr_t left, std::uintptr_t right, std::uintptr_t scale, std::uintptr_t out,
                          int threads) {
  project_gradients(
      {batch, in_features, out_features, rank, q, p, element_of(element), at<const void>(activations),
       at<const void>(output_grads), at<const std::int64_t>(offsets), at<const float>(left),
       at<const float>(right), at<const float>(scale)},
      at<float>(out), threads);
}

RowType row_type_of(const std::string& name) {
  if (name == "float32") return RowType::float32;
  if (name == "float16") return RowType::float16;
  if (name == "int8") return RowType::int8;
  if (name == "int4") return RowType::int4;
  if (name == "sign") return RowType::sign;
  throw std::invalid_argument("row type must be float32, float16, int8, int4 or sign, got '" + name + "'");
}

Rows rows_at(std::uintptr_t rows, const std::string& row_type, ptrdiff_t row_stride, std::uintptr_t scales,
             size_t N, size_t L, size_t d) {
  return {at<const void>(rows), row_type_of(row_type), row_stride, at<const float>(scales), N, L, d};
}

TopK top_at(size_t Q, size_t k, bool largest, std::uintptr_t scores, std::uintptr_t positions) {
  return {Q, k, largest, at<float>(scores), at<std::int64_t>(positions)};
}

void score_topk_at(std::uintptr_t queries, const Rows& rows, const TopK& top, int threads) {
  score_topk(at<const float>(queries), rows, top, threads);
}

void rescored_topk_at(std::uintptr_t queries, const Rows& codes, const Rows& wider,
                      std::uintptr_t squared_norms, const TopK& top, std::uintptr_t rescored, int threads) {
  rescored_topk(at<const float>(queries), codes, wider, at<const float>(squared_norms), top,
                at<std::int64_t>(rescored), threads);
}

void mixed_topk_at(const Task& task, std::uintptr_t squared_norms, const Rows& rows, const TopK& top,
                   std::uintptr_t doubtful, int threads) {
  mixed_topk(task, at<const float>(squared_norms), rows, top, at<bool>(doubtful), threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of trackstar_kernels.";

  m.def("available_isas", &available_isas, "Instruction set levels that this machine can run, lowest first.");
  m.def("isa", &isa_name, "The level in force.");
  m.def("set_isa", &set_isa_by_name, py::arg("name"), "Put a level in force, for tests and benchmarks.");

  m.def("project_gradients", &project_gradients_at, py::arg("batch"), py::arg("in_features"),
        py::arg("out_features"), py::arg("rank"), py::arg("q"), py::arg("p"), py::arg("element"),
        py::arg("activations"), py::arg("output_grads"), py::arg("offsets"), py::arg("left"),
        py::arg("right"), py::arg("scale"), py::arg("out"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(), "csrc/gradient.h; arrays as addresses.");
  py::class_<Rows>(m, "Rows", "Stored rows, by address: see csrc/scoring.h.")
      .def(py::init(&rows_at), py::arg("values"), py::arg("type"), py::arg("stride"), py::arg("scales"),
           py::arg("N"), py::arg("L"), py::arg("d"));
  py::class_<TopK>(m, "TopK", "Where results go, by address: see csrc/scoring.h.")
      .def(py::init(&top_at), py::arg("Q"), py::arg("k"), py::arg("largest"), py::arg("scores"),
           py::arg("positions"));
  m.def("score_topk", &score_topk_at, py::arg("queries"), py::arg("rows"), py::arg("top"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(), "See csrc/scoring.h.");
  m.def("rescored_topk", &rescored_topk_at, py::arg("queries"), py::arg("codes"), py::arg("wider"),
        py::arg("squared_norms"), py::arg("top"), py::arg("rescored"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(), "See csrc/scoring.h.");
  py::class_<Task>(m, "Task",
                   "Queries under another inner product, copied from addresses: see csrc/scoring.h.")
      .def(py::init([](size_t Q, size_t L, size_t d, size_t rank, double base, double sign, double trusted) {
             return new Task({Q, L, d, rank, base, sign, trusted});
           }),
           py::arg("Q"), py::arg("L"), py::arg("d"), py::arg("rank"), py::arg("base"), py::arg("sign"),
           py::arg("trusted"))
      .def(
          "set_block",
          [](Task& task, size_t b, std::uintptr_t factors, std::uintptr_t combine) {
            task.set_block(b, at<const float>(factors), at<const float>(combine));
          },
          py::arg("b"), py::arg("factors"), py::arg("combine"))
      .def(
          "set_weights",
          [](Task& task, std::uintptr_t weights) { task.set_weights(at<const float>(weights)); },
          py::arg("weights"));
  m.def("mixed_topk", &mixed_topk_at, py::arg("task"), py::arg("squared_norms"), py::arg("rows"),
        py::arg("top"), py::arg("doubtful"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "See csrc/scoring.h.");
}
