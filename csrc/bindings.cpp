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
#ifdef TRACKSTAR_HAS_CUDA
#include "cuda/scoring.h"
#endif

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
  if (name == "bfloat16") return RowType::bfloat16;
  if (name == "int8") return RowType::int8;
  if (name == "int4") return RowType::int4;
  if (name == "sign") return RowType::sign;
  throw std::invalid_argument("row type must be float32, float16, bfloat16, int8, int4 or sign, got '" +
                              name + "'");
}

Rows rows_at(std::uintptr_t rows, const std::string& row_type, ptrdiff_t row_stride, std::uintptr_t scales,
             size_t N, size_t L, size_t d) {
  if (N > UINT32_MAX) {
    throw std::invalid_argument("rows must be fewer than 2**32, got " + std::to_string(N));
  }
  return {at<const void>(rows), row_type_of(row_type), row_stride, at<const float>(scales), N, L, d};
}

TopK top_at(size_t Q, size_t k, bool largest, std::uintptr_t scores, std::uintptr_t positions,
            std::uintptr_t reached) {
  return {Q, k, largest, at<float>(scores), at<std::int64_t>(positions), at<const float>(reached)};
}

void score_topk_at(std::uintptr_t queries, const Rows& rows, const std::vector<TopK>& tops, int threads) {
  score_topk(at<const float>(queries), rows, tops, threads);
}

void score_queries_at(const Queries& queries, const Rows& rows, const std::vector<TopK>& tops, int threads) {
  score_topk(queries, rows, tops, threads);
}

void rescored_topk_at(std::uintptr_t queries, const Rows& codes, const Rows& wider,
                      std::uintptr_t squared_norms, const std::vector<TopK>& tops, std::uintptr_t rescored,
                      int threads) {
  rescored_topk(at<const float>(queries), codes, wider, at<const float>(squared_norms), tops,
                at<std::int64_t>(rescored), threads);
}

void mixed_topk_at(const Task& task, std::uintptr_t squared_norms, const Rows& rows,
                   const std::vector<TopK>& tops, std::uintptr_t doubtful, int threads) {
  mixed_topk(task, at<const float>(squared_norms), rows, tops, at<bool>(doubtful), threads);
}

void mixed_parts_at(const Task& task, const Rows& rows, std::uintptr_t numerators, std::uintptr_t squares,
                    std::uintptr_t inner, int threads) {
  mixed_parts(task, rows, {at<float>(numerators), at<double>(squares), at<double>(inner)}, threads);
}

#ifdef TRACKSTAR_HAS_CUDA

cuda::Rows cuda_rows_at(std::uintptr_t values, const std::string& type, ptrdiff_t stride,
                        std::uintptr_t scales, size_t N, int L, int d) {
  const std::pair<const char*, cuda::RowType> types[] = {{"float32", cuda::RowType::float32},
                                                         {"float16", cuda::RowType::float16},
                                                         {"bfloat16", cuda::RowType::bfloat16},
                                                         {"int8", cuda::RowType::int8}};
  for (const auto& [name, row_type] : types) {
    if (type == name) return {at<const void>(values), row_type, stride, at<const float>(scales), N, L, d};
  }
  throw std::invalid_argument("type must be float32, float16, bfloat16 or int8, got '" + type + "'");
}

cuda::Survivors cuda_survivors_at(std::uintptr_t keys, int Q, int k, int slices, int capacity, bool largest) {
  return {at<std::int64_t>(keys), Q, k, slices, capacity, largest};
}

void cuda_score_topk_at(const cuda::Rows& rows, std::uintptr_t queries, std::uintptr_t operand,
                        std::uintptr_t query_scales, int columns, const cuda::Survivors& survivors,
                        std::uintptr_t stream) {
  cuda::score_topk(rows, at<const float>(queries), at<const void>(operand), at<const float>(query_scales),
                   columns, survivors, at<void>(stream));
}

void cuda_mixed_topk_at(const cuda::Rows& rows, std::uintptr_t factors, std::uintptr_t combine,
                        std::uintptr_t factor_scales, std::uintptr_t squared_norms, int rank, double base,
                        double sign, double trusted, std::uintptr_t doubtful, int columns,
                        const cuda::Survivors& survivors, std::uintptr_t stream) {
  cuda::mixed_topk(rows,
                   {at<const void>(factors), at<const void>(combine), at<const float>(factor_scales),
                    at<const float>(squared_norms), rank, base, sign, trusted, at<bool>(doubtful)},
                   columns, survivors, at<void>(stream));
}

void add_cuda(py::module_& m) {
  py::class_<cuda::Rows>(m, "CudaRows", "Stored rows, by address: see csrc/cuda/scoring.h.")
      .def(py::init(&cuda_rows_at), py::arg("values"), py::arg("type"), py::arg("stride"), py::arg("scales"),
           py::arg("N"), py::arg("L"), py::arg("d"));
  py::class_<cuda::Survivors>(m, "CudaSurvivors", "Room for keys, by address: see csrc/cuda/scoring.h.")
      .def(py::init(&cuda_survivors_at), py::arg("keys"), py::arg("Q"), py::arg("k"), py::arg("slices"),
           py::arg("capacity"), py::arg("largest"));
  m.def("cuda_score_topk", &cuda_score_topk_at, py::arg("rows"), py::arg("queries"), py::arg("operand"),
        py::arg("query_scales"), py::arg("columns"), py::arg("survivors"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>(), "See csrc/cuda/scoring.h.");
  m.def("cuda_mixed_topk", &cuda_mixed_topk_at, py::arg("rows"), py::arg("factors"), py::arg("combine"),
        py::arg("factor_scales"), py::arg("squared_norms"), py::arg("rank"), py::arg("base"), py::arg("sign"),
        py::arg("trusted"), py::arg("doubtful"), py::arg("columns"), py::arg("survivors"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>(), "See csrc/cuda/scoring.h.");
}

#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of trackstar_kernels.";

#ifdef TRACKSTAR_HAS_CUDA
  m.attr("with_cuda") = true;
  add_cuda(m);
#else
  m.attr("with_cuda") = false;
#endif

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
           py::arg("positions"), py::arg("reached"));
  m.def("score_topk", &score_topk_at, py::arg("queries"), py::arg("rows"), py::arg("tops"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>(), "See csrc/scoring.h.");
  py::class_<Queries>(m, "Queries", "Queries for many scans, copied from an address: see csrc/scoring.h.")
      .def(py::init([](std::uintptr_t values, size_t Q, size_t L, size_t d) {
             return new Queries(at<const float>(values), Q, L, d);
           }),
           py::arg("values"), py::arg("Q"), py::arg("L"), py::arg("d"));
  m.def("score_queries", &score_queries_at, py::arg("queries"), py::arg("rows"), py::arg("tops"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>(), "score_topk: see csrc/scoring.h.");
  m.def("rescored_topk", &rescored_topk_at, py::arg("queries"), py::arg("codes"), py::arg("wider"),
        py::arg("squared_norms"), py::arg("tops"), py::arg("rescored"), py::arg("threads"),
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
        py::arg("tops"), py::arg("doubtful"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "See csrc/scoring.h.");
  m.def("mixed_parts", &mixed_parts_at, py::arg("task"), py::arg("rows"), py::arg("numerators"),
        py::arg("squares"), py::arg("inner"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "See csrc/scoring.h.");
}
