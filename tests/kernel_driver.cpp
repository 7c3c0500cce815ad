// Runs a kernel on arrays in raw files, for processors other than this one: see test_other_processors.py.
//
//   kernel_driver project_gradients BATCH IN OUT RANK Q P ELEMENT ACTIVATIONS OUTPUT_GRADS OFFSETS LEFT RIGHT SCALE RESULT
//   kernel_driver pack_best_codes N D UNIT CODES
//   kernel_driver score_topk QUERIES K N L D TYPE LARGEST QUERY_FILE ROW_FILE SCALES SCORES POSITIONS
//   kernel_driver rescored_topk QUERIES K N L D TYPE WIDER_TYPE LARGEST QUERY_FILE ROW_FILE SCALES WIDER_FILE NORMS
//       SCORES POSITIONS RESCORED
//   kernel_driver mixed_topk QUERIES K N L D RANK TYPE LARGEST BASE SIGN TRUSTED FACTORS COMBINE WEIGHTS ROW_FILE SCALES
//       NORMS SCORES POSITIONS DOUBTFUL
//   kernel_driver mixed_parts QUERIES N L D RANK TYPE BASE SIGN FACTORS COMBINE WEIGHTS ROW_FILE SCALES NUMERATORS
//       SQUARES INNER
//
// ELEMENT and TYPE are numbers of their enums; an absent file is a "-". FACTORS are (L, RANK, D) and COMBINE
// (L, QUERIES, RANK). Before all these may stand "isa LEVEL", another number of an enum, and "threads COUNT".
#include <cstdint>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "encoding.h"
#include "gradient.h"
#include "scoring.h"

namespace {

// The arguments, one after another.
class Arguments {
 public:
  Arguments(int count, char** values) : values_(values + 1, values + count) {}

  std::string text() { return values_.at(next_++); }
  int64_t number() { return std::stoll(text()); }
  double real() { return std::stod(text()); }
  // Whether `word` is next, which is then behind.
  bool option(const std::string& word) {
    const bool given = values_.at(next_) == word;
    next_ += given;
    return given;
  }

  // The bytes of a file, which stay where they are; null for "-". Their memory ends where they do, so that a sanitizer
  // sees whoever reads on.
  template <typename T>
  const T* file() {
    const std::string path = text();
    if (path == "-") return nullptr;
    std::ifstream stream(path, std::ios::binary | std::ios::ate);
    const std::streamoff size = stream.tellg();
    files_.push_back(std::make_unique<char[]>(size));
    if (!stream.seekg(0).read(files_.back().get(), size)) throw std::runtime_error("cannot read " + path);
    return reinterpret_cast<const T*>(files_.back().get());
  }

 private:
  std::vector<std::string> values_;
  size_t next_ = 0;
  std::vector<std::unique_ptr<char[]>> files_;
};

// Room for a result, and the file that it goes to.
template <typename T>
class Result {
 public:
  explicit Result(size_t size) : size_(size), values_(new T[size]) {}

  T* data() { return values_.get(); }
  void write(const std::string& path) const {
    std::ofstream stream(path, std::ios::binary);
    stream.write(reinterpret_cast<const char*>(values_.get()), size_ * sizeof(T));
    if (!stream.flush()) throw std::runtime_error("cannot write " + path);
  }

 private:
  size_t size_;
  std::unique_ptr<T[]> values_;  // not a vector, whose bools are bits
};

void project_gradients(Arguments& arguments, int threads) {
  trackstar::GradientBatch x;
  for (int64_t* size : {&x.batch, &x.in_features, &x.out_features, &x.rank, &x.q, &x.p}) {
    *size = arguments.number();
  }
  x.element = static_cast<trackstar::Element>(arguments.number());
  x.activations = arguments.file<void>();
  x.output_grads = arguments.file<void>();
  x.offsets = arguments.file<int64_t>();
  x.left = arguments.file<float>();
  x.right = arguments.file<float>();
  x.scale = arguments.file<float>();
  Result<float> out(x.batch * x.q * x.p);
  trackstar::project_gradients(x, out.data(), threads);
  out.write(arguments.text());
}

constexpr size_t int4_bytes(size_t d) { return (d + 63) / 64 + (d + 1) / 2; }

void pack_best_codes(Arguments& arguments, int threads) {
  const size_t N = arguments.number(), d = arguments.number();
  const float* unit = arguments.file<float>();
  Result<uint8_t> codes(N * int4_bytes(d));
  trackstar::pack_best_codes(unit, N, d, codes.data(), threads);
  codes.write(arguments.text());
}

// Rows as they follow each other in a file.
trackstar::Rows rows_of(const void* values, trackstar::RowType type, const float* scales, size_t N, size_t L,
                        size_t d) {
  const size_t numbers = type == trackstar::RowType::int4   ? int4_bytes(d)
                         : type == trackstar::RowType::sign ? (d + 31) / 32
                                                            : d;
  return {values, type, static_cast<ptrdiff_t>(L * numbers), scales, N, L, d};
}

void score_topk(Arguments& arguments, int threads, bool wider) {
  const size_t Q = arguments.number(), k = arguments.number(), N = arguments.number();
  const size_t L = arguments.number(), d = arguments.number();
  const auto type = static_cast<trackstar::RowType>(arguments.number());
  const auto wider_type = static_cast<trackstar::RowType>(wider ? arguments.number() : 0);
  const bool largest = arguments.number();
  const float* queries = arguments.file<float>();
  const void* values = arguments.file<void>();
  const trackstar::Rows rows = rows_of(values, type, arguments.file<float>(), N, L, d);
  Result<float> scores(Q * k);
  Result<int64_t> positions(Q * k), rescored(Q);
  const std::vector<trackstar::TopK> tops = {{Q, k, largest, scores.data(), positions.data()}};
  if (wider) {
    const trackstar::Rows whole = rows_of(arguments.file<void>(), wider_type, nullptr, N, L, d);
    trackstar::rescored_topk(queries, rows, whole, arguments.file<float>(), tops, rescored.data(), threads);
  } else {
    trackstar::score_topk(queries, rows, tops, threads);
  }
  scores.write(arguments.text());
  positions.write(arguments.text());
  if (wider) rescored.write(arguments.text());
}

// A task of queries whose factors, combinations and weights come next.
std::unique_ptr<trackstar::Task> task_of(Arguments& arguments, const trackstar::Task::Shape& shape) {
  auto task = std::make_unique<trackstar::Task>(shape);
  const float* factors = arguments.file<float>();
  const float* combine = arguments.file<float>();
  for (size_t b = 0; b < shape.L; ++b) {
    task->set_block(b, factors + b * shape.rank * shape.d, combine + b * shape.Q * shape.rank);
  }
  task->set_weights(arguments.file<float>());
  return task;
}

void mixed_topk(Arguments& arguments, int threads) {
  const size_t Q = arguments.number(), k = arguments.number(), N = arguments.number();
  const size_t L = arguments.number(), d = arguments.number(), rank = arguments.number();
  const auto type = static_cast<trackstar::RowType>(arguments.number());
  const bool largest = arguments.number();
  const double base = arguments.real(), sign = arguments.real(), trusted = arguments.real();
  const auto task = task_of(arguments, {Q, L, d, rank, base, sign, trusted});
  const void* values = arguments.file<void>();
  const trackstar::Rows rows = rows_of(values, type, arguments.file<float>(), N, L, d);
  const float* squared_norms = arguments.file<float>();
  Result<float> scores(Q * k);
  Result<int64_t> positions(Q * k);
  Result<bool> doubtful(N);
  const std::vector<trackstar::TopK> tops = {{Q, k, largest, scores.data(), positions.data()}};
  trackstar::mixed_topk(*task, squared_norms, rows, tops, doubtful.data(), threads);
  scores.write(arguments.text());
  positions.write(arguments.text());
  doubtful.write(arguments.text());
}

void mixed_parts(Arguments& arguments, int threads) {
  const size_t Q = arguments.number(), N = arguments.number(), L = arguments.number();
  const size_t d = arguments.number(), rank = arguments.number();
  const auto type = static_cast<trackstar::RowType>(arguments.number());
  const double base = arguments.real(), sign = arguments.real();
  const auto task = task_of(arguments, {Q, L, d, rank, base, sign, 0.0});
  const void* values = arguments.file<void>();
  const trackstar::Rows rows = rows_of(values, type, arguments.file<float>(), N, L, d);
  Result<float> numerators(N * Q);
  Result<double> squares(N), inner(N);
  trackstar::mixed_parts(*task, rows, {numerators.data(), squares.data(), inner.data()}, threads);
  numerators.write(arguments.text());
  squares.write(arguments.text());
  inner.write(arguments.text());
}

}  // namespace

int main(int count, char** values) {
  Arguments arguments(count, values);
  if (arguments.option("isa")) {
    const auto level = static_cast<trackstar::Isa>(arguments.number());
    if (!trackstar::isa_available(level)) throw std::invalid_argument("this machine lacks the level");
    trackstar::set_isa(level);
  }
  const int threads = arguments.option("threads") ? static_cast<int>(arguments.number()) : 1;
  const std::string op = arguments.text();
  if (op == "project_gradients") {
    project_gradients(arguments, threads);
  } else if (op == "pack_best_codes") {
    pack_best_codes(arguments, threads);
  } else if (op == "score_topk" || op == "rescored_topk") {
    score_topk(arguments, threads, op == "rescored_topk");
  } else if (op == "mixed_topk") {
    mixed_topk(arguments, threads);
  } else if (op == "mixed_parts") {
    mixed_parts(arguments, threads);
  } else {
    throw std::invalid_argument("unknown op " + op);
  }
}
