// The Python module trackstar_kernels._C: the only file that knows pybind11.
//
// Arrays arrive as addresses and sizes, so this builds without torch's headers and one wheel serves every torch. The
// Python side has checked tensors; here sizes that contradict each other, arrays that are missing and parts of a task
// that were never set are errors before anything is read. Every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "encoding.h"
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
const std::pair<const char*, Isa> kLevels[] = {
    {kBaseline, Isa::baseline}, {"x86-64-v3", Isa::v3},        {"avx-vnni", Isa::v3_vnni},
    {"x86-64-v4", Isa::v4},     {"avx512-vnni", Isa::v4_vnni}, {"avx512-bf16", Isa::v4_bf16},
    {"amx", Isa::amx}};

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

void require(bool fits, const std::string& wanted) {
  if (!fits) throw std::invalid_argument(wanted);
}

// The address of an array that has numbers.
template <typename T>
T* array(const char* name, std::uintptr_t address) {
  require(address != 0, std::string(name) + " must be the address of an array, got 0");
  return at<T>(address);
}

// Sizes of an array, of which no product overflows; from 1, or from 0 where an array may be empty.
void check_sizes(const char* names, std::initializer_list<std::int64_t> sizes, std::int64_t least = 1) {
  constexpr std::int64_t kMost = std::int64_t{1} << 48;
  std::int64_t numbers = 1;
  for (const std::int64_t size : sizes) {
    require(size >= least && size <= kMost / std::max<std::int64_t>(1, numbers),
            std::string(names) + " must be sizes of at least " + std::to_string(least) +
                " and an array of at most 2**48 numbers");
    numbers *= std::max<std::int64_t>(1, size);
  }
}

void check_threads(int threads) {
  constexpr int kMost = 4096;  // OpenMP ends a process that cannot start the threads it asks for
  require(threads >= 1 && threads <= kMost, "threads must be from 1 to 4096, got " + std::to_string(threads));
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
  check_threads(threads);
  check_sizes("batch, q and p", {batch, q, p}, 0);
  check_sizes("rank, q and out_features", {rank, q, out_features}, 0);
  check_sizes("rank, p and in_features", {rank, p, in_features}, 0);
  check_sizes("out_features and in_features", {out_features, in_features}, 0);
  const auto* starts = array<const std::int64_t>("offsets", offsets);
  require(starts[0] == 0 && std::is_sorted(starts, starts + batch + 1), "offsets must ascend from 0");
  const std::int64_t tokens = starts[batch];
  check_sizes("tokens and in_features", {tokens, in_features}, 0);
  check_sizes("tokens and out_features", {tokens, out_features}, 0);
  const auto given = [](const char* name, std::uintptr_t address, bool empty) {
    return empty ? at<void>(address) : array<void>(name, address);
  };
  const bool no_left = rank == 0 || q == 0 || out_features == 0;
  const bool no_right = rank == 0 || p == 0 || in_features == 0;
  project_gradients({batch, in_features, out_features, rank, q, p, element_of(element),
                     given("activations", activations, tokens == 0 || in_features == 0),
                     given("output_grads", output_grads, tokens == 0 || out_features == 0), starts,
                     static_cast<const float*>(given("left", left, no_left)),
                     static_cast<const float*>(given("right", right, no_right)), at<const float>(scale)},
                    static_cast<float*>(given("out", out, batch == 0 || q == 0 || p == 0)), threads);
}

void pack_best_codes_at(std::int64_t blocks, std::int64_t d, std::uintptr_t unit, std::uintptr_t codes,
                        int threads) {
  check_threads(threads);
  check_sizes("blocks and d", {blocks, d}, 0);
  if (blocks == 0 || d == 0) return;
  pack_best_codes(array<const float>("unit", unit), static_cast<std::size_t>(blocks),
                  static_cast<std::size_t>(d), array<std::uint8_t>("codes", codes), threads);
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

Rows rows_at(std::uintptr_t values, const std::string& type, std::int64_t stride, std::uintptr_t scales,
             std::int64_t N, std::int64_t L, std::int64_t d) {
  require(N <= UINT32_MAX, "rows must be fewer than 2**32, got " + std::to_string(N));
  check_sizes("N, L and d", {N, L, d});
  require(stride >= 0, "stride must be at least 0, got " + std::to_string(stride));
  check_sizes("N and stride", {N, stride}, 0);
  return {array<const void>("values", values),
          row_type_of(type),
          stride,
          at<const float>(scales),
          static_cast<size_t>(N),
          static_cast<size_t>(L),
          static_cast<size_t>(d)};
}

TopK top_at(std::int64_t Q, std::int64_t k, bool largest, std::uintptr_t scores, std::uintptr_t positions,
            std::uintptr_t reached) {
  check_sizes("Q and k", {Q, k});
  return {static_cast<size_t>(Q),
          static_cast<size_t>(k),
          largest,
          array<float>("scores", scores),
          array<std::int64_t>("positions", positions),
          at<const float>(reached)};
}

void check_tops(const std::vector<TopK>& tops, const Rows& rows) {
  require(!tops.empty(), "tops must hold at least one result, got none");
  for (const TopK& top : tops) {
    require(top.Q == tops.front().Q, "tops must have equal Q");
    require(top.k <= rows.N,
            "k must be from 1 to N (=" + std::to_string(rows.N) + "), got " + std::to_string(top.k));
  }
}

bool is_float(RowType type) {
  return type == RowType::float32 || type == RowType::float16 || type == RowType::bfloat16;
}

void score_topk_at(std::uintptr_t queries, const Rows& rows, const std::vector<TopK>& tops, int threads) {
  check_threads(threads);
  check_tops(tops, rows);
  score_topk(array<const float>("queries", queries), rows, tops, threads);
}

// Queries, and what shape they have.
class CheckedQueries {
 public:
  CheckedQueries(std::uintptr_t values, std::int64_t Q, std::int64_t L, std::int64_t d,
                 const std::string& type)
      : shape_(checked(Q, L, d)),
        type_(checked(type)),
        queries_(array<const float>("values", values), shape_[0], shape_[1], shape_[2], type_) {}

  // The queries, if such rows are what they can score.
  const Queries& of(const Rows& rows) const {
    require(rows.type == type_, "rows must be of the type that the queries are for");
    require(rows.L == shape_[1] && rows.d == shape_[2], "rows must have the queries' L and d");
    return queries_;
  }
  size_t count() const { return shape_[0]; }

 private:
  static std::array<size_t, 3> checked(std::int64_t Q, std::int64_t L, std::int64_t d) {
    check_sizes("Q, L and d", {Q, L, d});
    return {static_cast<size_t>(Q), static_cast<size_t>(L), static_cast<size_t>(d)};
  }

  static RowType checked(const std::string& type) {
    const RowType found = row_type_of(type);
    require(is_float(found), "type must be float32, float16 or bfloat16, got '" + type + "'");
    return found;
  }

  std::array<size_t, 3> shape_;
  RowType type_;
  Queries queries_;
};

void score_queries_at(const CheckedQueries& queries, const Rows& rows, const std::vector<TopK>& tops,
                      int threads) {
  check_threads(threads);
  check_tops(tops, rows);
  require(tops.front().Q == queries.count(), "tops must have the queries' Q");
  score_topk(queries.of(rows), rows, tops, threads);
}

Found found_at(std::uintptr_t scores, std::uintptr_t positions, std::int64_t k) {
  check_sizes("k", {k});
  return {array<const float>("scores", scores), array<const std::int64_t>("positions", positions),
          static_cast<size_t>(k)};
}

void merge_topk_at(const std::vector<Found>& parts, const TopK& top) {
  size_t held = 0;
  for (const Found& part : parts) held += part.k;
  require(top.k <= held, "parts must hold at least k results");
  merge_topk(parts, top);
}

void rescored_topk_at(std::uintptr_t queries, const Rows& codes, const Rows& wider,
                      std::uintptr_t squared_norms, const std::vector<TopK>& tops, std::uintptr_t rescored,
                      int threads) {
  check_threads(threads);
  check_tops(tops, codes);
  require(!is_float(codes.type), "codes must be int8, int4 or sign");
  require(wider.type == RowType::float32 || wider.type == RowType::float16,
          "wider must be float32 or float16");
  require(wider.N == codes.N && wider.L * wider.d == codes.L * codes.d,
          "wider must be as many rows of as many numbers as codes");
  rescored_topk(array<const float>("queries", queries), codes, wider,
                array<const float>("squared_norms", squared_norms), tops,
                array<std::int64_t>("rescored", rescored), threads);
}

// A task, and what of it has been set.
class CheckedTask {
 public:
  CheckedTask(std::int64_t Q, std::int64_t L, std::int64_t d, std::int64_t rank, double base, double sign,
              double trusted)
      : shape_(shape_of(Q, L, d, rank, base, sign, trusted)), task_(shape_), blocks_(shape_.L) {}

  void set_block(std::int64_t b, std::uintptr_t factors, std::uintptr_t combine) {
    require(b >= 0 && b < static_cast<std::int64_t>(shape_.L),
            "b must be from 0 to L - 1 (=" + std::to_string(shape_.L - 1) + "), got " + std::to_string(b));
    task_.set_block(b, array<const float>("factors", factors), array<const float>("combine", combine));
    blocks_[b] = true;
  }

  void set_weights(std::uintptr_t weights) {
    task_.set_weights(array<const float>("weights", weights));
    weighted_ = true;
  }

  // The task, if it is whole and such rows are what it is for.
  const Task& of(const Rows& rows) const {
    require(weighted_ && std::count(blocks_.begin(), blocks_.end(), false) == 0,
            "task must have all its blocks and weights set");
    require(rows.L == shape_.L && rows.d == shape_.d, "rows must have the task's L and d");
    return task_;
  }
  size_t queries() const { return shape_.Q; }

 private:
  static Task::Shape shape_of(std::int64_t Q, std::int64_t L, std::int64_t d, std::int64_t rank, double base,
                              double sign, double trusted) {
    check_sizes("L, rank and d", {L, rank, d});
    check_sizes("L, Q and rank", {L, Q, rank});
    return {static_cast<size_t>(Q),
            static_cast<size_t>(L),
            static_cast<size_t>(d),
            static_cast<size_t>(rank),
            base,
            sign,
            trusted};
  }

  Task::Shape shape_;
  Task task_;
  std::vector<bool> blocks_;
  bool weighted_ = false;
};

void mixed_topk_at(const CheckedTask& task, std::uintptr_t squared_norms, const Rows& rows,
                   const std::vector<TopK>& tops, std::uintptr_t doubtful, int threads) {
  check_threads(threads);
  check_tops(tops, rows);
  require(tops.front().Q == task.queries(), "tops must have the task's Q");
  mixed_topk(task.of(rows), array<const float>("squared_norms", squared_norms), rows, tops,
             array<bool>("doubtful", doubtful), threads);
}

void mixed_parts_at(const CheckedTask& task, const Rows& rows, std::uintptr_t numerators,
                    std::uintptr_t squares, std::uintptr_t inner, int threads) {
  check_threads(threads);
  require(!is_float(rows.type), "rows must be int8, int4 or sign");
  mixed_parts(task.of(rows), rows,
              {array<float>("numerators", numerators), array<double>("squares", squares),
               array<double>("inner", inner)},
              threads);
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
  m.def("pack_best_codes", &pack_best_codes_at, py::arg("blocks"), py::arg("d"), py::arg("unit"),
        py::arg("codes"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "csrc/encoding.h; arrays as addresses.");
  py::class_<Rows>(m, "Rows", "Stored rows, by address: see csrc/scoring.h.")
      .def(py::init(&rows_at), py::arg("values"), py::arg("type"), py::arg("stride"), py::arg("scales"),
           py::arg("N"), py::arg("L"), py::arg("d"));
  py::class_<TopK>(m, "TopK", "Where results go, by address: see csrc/scoring.h.")
      .def(py::init(&top_at), py::arg("Q"), py::arg("k"), py::arg("largest"), py::arg("scores"),
           py::arg("positions"), py::arg("reached"));
  m.def("score_topk", &score_topk_at, py::arg("queries"), py::arg("rows"), py::arg("tops"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>(), "See csrc/scoring.h.");
  py::class_<CheckedQueries>(m, "Queries", "Queries for many scans, by address: see csrc/scoring.h.")
      .def(py::init<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t, const std::string&>(),
           py::arg("values"), py::arg("Q"), py::arg("L"), py::arg("d"), py::arg("type"));
  m.def("score_queries", &score_queries_at, py::arg("queries"), py::arg("rows"), py::arg("tops"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>(), "score_topk: see csrc/scoring.h.");
  py::class_<Found>(m, "Found", "What a scan found, by address: see csrc/scoring.h.")
      .def(py::init(&found_at), py::arg("scores"), py::arg("positions"), py::arg("k"));
  m.def("merge_topk", &merge_topk_at, py::arg("parts"), py::arg("top"),
        py::call_guard<py::gil_scoped_release>(), "See csrc/scoring.h.");
  m.def("rescored_topk", &rescored_topk_at, py::arg("queries"), py::arg("codes"), py::arg("wider"),
        py::arg("squared_norms"), py::arg("tops"), py::arg("rescored"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(), "See csrc/scoring.h.");
  py::class_<CheckedTask>(m, "Task",
                          "Queries under another inner product, copied from addresses: see csrc/scoring.h.")
      .def(py::init<std::int64_t, std::int64_t, std::int64_t, std::int64_t, double, double, double>(),
           py::arg("Q"), py::arg("L"), py::arg("d"), py::arg("rank"), py::arg("base"), py::arg("sign"),
           py::arg("trusted"))
      .def("set_block", &CheckedTask::set_block, py::arg("b"), py::arg("factors"), py::arg("combine"))
      .def("set_weights", &CheckedTask::set_weights, py::arg("weights"));
  m.def("mixed_topk", &mixed_topk_at, py::arg("task"), py::arg("squared_norms"), py::arg("rows"),
        py::arg("tops"), py::arg("doubtful"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "See csrc/scoring.h.");
  m.def("mixed_parts", &mixed_parts_at, py::arg("task"), py::arg("rows"), py::arg("numerators"),
        py::arg("squares"), py::arg("inner"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "See csrc/scoring.h.");
}
