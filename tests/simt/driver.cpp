// The functions of csrc/cuda/scoring.h, run by simt.h, for Python's ctypes.
#include "cuda/scoring.cu"

#include <cstdio>
#include <string>

using namespace trackstar::cuda;

namespace {

// What went wrong in the last call.
std::string& message() {
  static std::string text;
  return text;
}

template <typename Call>
const char* guarded(Call call) {
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    message() = error.what();
    return message().c_str();
  }
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
