// Runs a kernel on arrays in raw files, for processors other than this one: see test_other_processors.py.
//
//   kernel_driver project_gradients BATCH IN OUT RANK Q P ELEMENT ACTIVATIONS OUTPUT_GRADS OFFSETS LEFT RIGHT SCALE RESULT
//   kernel_driver score_topk QUERIES K N L D TYPE QUERY_FILE ROW_FILE SCORES POSITIONS
//
// ELEMENT and TYPE are numbers of their enums; an absent file is a "-".
#include <cstdint>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

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

void score_topk(Arguments& arguments) {
  const size_t Q = arguments.number(), k = arguments.number(), N = arguments.number();
  const size_t L = arguments.number(), d = arguments.number();
  const auto type = static_cast<trackstar::RowType>(arguments.number());
  const float* queries = arguments.file<float>();
  const void* rows = arguments.file<void>();
  std::vector<float> scores(Q * k);
  std::vector<int64_t> positions(Q * k);
  trackstar::score_topk(queries, {rows, type, static_cast<ptrdiff_t>(L * d), nullptr, N, L, d},
                        {{Q, k, true, scores.data(), positions.data()}}, 1);
  write(arguments.text(), scores);
  write(arguments.text(), positions);
}

}  // namespace

int main(int count, char** values) {
  Arguments arguments(count, values);
  const std::string op = arguments.text();
  if (op == "project_gradients") {
    project_gradients(arguments);
  } else if (op == "score_topk") {
    score_topk(arguments);
  } else {
    throw std::invalid_argument("unknown op " + op);
  }
}
