// Runs a kernel on arrays in raw files, for processors other than this one: see test_other_processors.py.
//
//   kernel_driver project_gradients BATCH IN OUT RANK Q P ELEMENT ACTIVATIONS OUTPUT_GRADS OFFSETS LEFT RIGHT SCALE RESULT
//   kernel_driver score_topk QUERIES K N L D TYPE LARGEST QUERY_FILE ROW_FILE SCALES SCORES POSITIONS
//   kernel_driver rescored_topk QUERIES K N L D TYPE WIDER_TYPE LARGEST QUERY_FILE ROW_FILE SCALES WIDER_FILE NORMS
//       SCORES POSITIONS RESCORED
//
// ELEMENT and TYPE are numbers of their enums; an absent file is a "-". Before all these may stand "isa LEVEL",
// another number of an enum.
#include <cstdint>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "gradient.h"
#include "scoring.h"

namespace {

// The arguments, one after another.
class Arguments {
 public:
  Arguments(int count, char** values) : values_(values + 1, values + count) {}

  std::string text() { return values_.at(next_++); }
  int64_t number() { return std::stoll(text()); }

  // The bytes of a file, which stay where they are; null for "-".
  template <typename T>
  const T* file() {
    const std::string path = text();
    if (path == "-") return nullptr;
    std::ifstream stream(path, std::ios::binary);
    if (!stream) throw std::runtime_error("cannot read " + path);
    files_.emplace_back(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
    return reinterpret_cast<const T*>(files_.back().data());
  }

 private:
  std::vector<std::string> values_;
  size_t next_ = 0;
  std::vector<std::vector<char>> files_;
};

template <typename T>
void write(const std::string& path, const std::vector<T>& values) {
  std::ofstream stream(path, std::ios::binary);
  stream.write(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
  if (!stream.flush()) throw std::runtime_error("cannot write " + path);
}

void project_gradients(Arguments& arguments) {
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
  std::vector<float> out(x.batch * x.q * x.p);
  trackstar::project_gradients(x, out.data(), 1);
  write(arguments.text(), out);
}

// Rows as they follow each other in a file.
trackstar::Rows rows_of(const void* values, trackstar::RowType type, const float* scales, size_t N, size_t L,
                        size_t d) {
  const size_t numbers = type == trackstar::RowType::int4   ? (d + 63) / 64 + (d + 1) / 2
                         : type == trackstar::RowType::sign ? (d + 31) / 32
                                                            : d;
  return {values, type, static_cast<ptrdiff_t>(L * numbers), scales, N, L, d};
}

void score_topk(Arguments& arguments, bool wider) {
  const size_t Q = arguments.number(), k = arguments.number(), N = arguments.number();
  const size_t L = arguments.number(), d = arguments.number();
  const auto type = static_cast<trackstar::RowType>(arguments.number());
  const auto wider_type = static_cast<trackstar::RowType>(wider ? arguments.number() : 0);
  const bool largest = arguments.number();
  const float* queries = arguments.file<float>();
  const void* values = arguments.file<void>();
  const trackstar::Rows rows = rows_of(values, type, arguments.file<float>(), N, L, d);
  std::vector<float> scores(Q * k);
  std::vector<int64_t> positions(Q * k), rescored(Q);
  const std::vector<trackstar::TopK> tops = {{Q, k, largest, scores.data(), positions.data()}};
  if (wider) {
    const trackstar::Rows whole = rows_of(arguments.file<void>(), wider_type, nullptr, N, L, d);
    trackstar::rescored_topk(queries, rows, whole, arguments.file<float>(), tops, rescored.data(), 1);
  } else {
    trackstar::score_topk(queries, rows, tops, 1);
  }
  write(arguments.text(), scores);
  write(arguments.text(), positions);
  if (wider) write(arguments.text(), rescored);
}

}  // namespace

int main(int count, char** values) {
  Arguments arguments(count, values);
  std::string op = arguments.text();
  if (op == "isa") {
    const auto level = static_cast<trackstar::Isa>(arguments.number());
    if (!trackstar::isa_available(level)) throw std::invalid_argument("this machine lacks the level");
    trackstar::set_isa(level);
    op = arguments.text();
  }
  if (op == "project_gradients") {
    project_gradients(arguments);
  } else if (op == "score_topk" || op == "rescored_topk") {
    score_topk(arguments, op == "rescored_topk");
  } else {
    throw std::invalid_argument("unknown op " + op);
  }
}
