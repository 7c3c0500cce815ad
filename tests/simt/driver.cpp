// The functions of csrc/cuda/scoring.h, run by simt.h: a library for Python's ctypes, and a program for sanitizers.
//
//     driver CALL RESULT
//
// CALL has the arguments: numbers as text, then the arrays, each in memory of its own size. RESULT gets the keys, and
// for mixed_topk what is doubtful.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "cuda/scoring.cu"

using namespace trackstar::cuda;

extern "C" const char* score_topk_on_cpu(const Rows* rows, const float* queries, const void* operand,
                                         const float* query_scales, int columns, const Survivors* survivors);
extern "C" const char* mixed_topk_on_cpu(const Rows* rows, const Mixing* mixing, int columns,
                                         const Survivors* survivors);

namespace {

// What went wrong in the last call, or null.
template <typename Call>
const char* guarded(Call call) {
  static std::string message;
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

template <typename T>
T number_from(std::istream& in) {
  double value;
  in >> value;
  return static_cast<T>(value);
}

using Array = std::unique_ptr<char[]>;

// An array after its size; null if that is 0.
Array array_from(std::istream& in) {
  const auto bytes = number_from<size_t>(in);
  in.get();
  if (bytes == 0) return nullptr;
  Array array(new char[bytes]);
  in.read(array.get(), static_cast<std::streamsize>(bytes));
  return array;
}

template <typename T>
const T* as(const Array& array) {
  return reinterpret_cast<const T*>(array.get());
}

}  // namespace

extern "C" const char* score_topk_on_cpu(const Rows* rows, const float* queries, const void* operand,
                                         const float* query_scales, int columns, const Survivors* survivors) {
  return guarded([&] { score_topk(*rows, queries, operand, query_scales, columns, *survivors, nullptr); });
}

extern "C" const char* mixed_topk_on_cpu(const Rows* rows, const Mixing* mixing, int columns,
                                         const Survivors* survivors) {
  return guarded([&] { mixed_topk(*rows, *mixing, columns, *survivors, nullptr); });
}

int main(int, char** arguments) {
  std::ifstream in(arguments[1], std::ios::binary);
  std::ofstream out(arguments[2], std::ios::binary);
  const auto mixed = number_from<bool>(in);
  Rows rows{};
  rows.type = static_cast<RowType>(number_from<int>(in));
  rows.stride = number_from<ptrdiff_t>(in);
  rows.N = number_from<size_t>(in);
  rows.L = number_from<int>(in);
  rows.d = number_from<int>(in);
  Survivors survivors{};
  survivors.Q = number_from<int>(in);
  survivors.k = number_from<int>(in);
  survivors.slices = number_from<int>(in);
  survivors.capacity = number_from<int>(in);
  survivors.largest = number_from<bool>(in);
  const auto columns = number_from<int>(in);
  Mixing mixing{};
  mixing.rank = number_from<int>(in);
  mixing.base = number_from<double>(in);
  mixing.sign = number_from<double>(in);
  mixing.trusted = number_from<double>(in);

  const Array values = array_from(in), scales = array_from(in);
  rows.values = values.get();
  rows.scales = as<float>(scales);
  const size_t size = static_cast<size_t>(survivors.Q) * survivors.slices * survivors.capacity;
  const std::unique_ptr<int64_t[]> keys(new int64_t[size]);
  survivors.keys = keys.get();
  const std::unique_ptr<bool[]> doubtful(new bool[mixed ? rows.N : 0]);

  const char* message;
  if (mixed) {
    const Array factors = array_from(in), combine = array_from(in), factor_scales = array_from(in),
                squared_norms = array_from(in);
    mixing.factors = factors.get();
    mixing.combine = combine.get();
    mixing.factor_scales = as<float>(factor_scales);
    mixing.squared_norms = as<float>(squared_norms);
    mixing.doubtful = doubtful.get();
    message = mixed_topk_on_cpu(&rows, &mixing, columns, &survivors);
  } else {
    const Array queries = array_from(in), operand = array_from(in), query_scales = array_from(in);
    message = score_topk_on_cpu(&rows, as<float>(queries), operand.get(), as<float>(query_scales), columns,
                                &survivors);
  }
  if (message != nullptr) {
    std::cerr << message << '\n';
    return 1;
  }
  out.write(reinterpret_cast<const char*>(keys.get()), static_cast<std::streamsize>(8 * size));
  if (mixed) out.write(reinterpret_cast<const char*>(doubtful.get()), static_cast<std::streamsize>(rows.N));
}
