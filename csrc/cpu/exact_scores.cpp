#include "cpu/exact_scores.h"

#include <algorithm>

#include "cpu/coded.h"
#include "cpu/scoring_kernel.h"

namespace trackstar {
namespace {

constexpr size_t kVectors = 256;  // that a chunk is summed of

constexpr size_t kAhead = 1024;  // bytes of each row that are fetched in advance

void prefetch(const uint8_t* from, size_t bytes) {
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
}

size_t depth() { return kVectors * scoring_kernels().lanes; }

}  // namespace

void ExactScores::score(size_t query, const int64_t* positions, size_t count, float* scores) const {
  const size_t most = depth(), block = block_bytes(rows_.type, rows_.d);
  const uint8_t* codes[kTogether];
  const void* floats[kTogether];
  float scale[kTogether], sums[kTogether] = {};
  const size_t row_bytes = rows_.L * block;
  for (size_t r = 0; r < count; ++r) prefetch(row_at(rows_, positions[r]), std::min(kAhead, row_bytes));
  for (size_t b = 0; b < rows_.L; ++b) {
    for (size_t i = 0; i < rows_.d; i += most) {
      const size_t n = std::min(most, rows_.d - i);
      const float* values = queries_ + (query * rows_.L + b) * rows_.d + i;
      for (size_t r = 0; r < kTogether; ++r) {
        const size_t position = positions[std::min(r, count - 1)];
        floats[r] = codes[r] = row_at(rows_, position) + b * block + block_bytes(rows_.type, i);
        if (r < count) prefetch(codes[r] + kAhead, block_bytes(rows_.type, n));
        scale[r] = rows_.scales ? sign_ * rows_.scales[position * rows_.L + b] : sign_;
      }
      if (is_coded(rows_.type)) {
        code_kernels(rows_.type).exact(codes, values, n, scale, sums);
      } else {
        const ScoringKernels& kernels = scoring_kernels();
        const RowKernels& kernel = rows_.type == RowType::float16 ? kernels.half : kernels.single;
        kernel.dot[0].run(floats, floats, values, n, scale, sums, 1);
      }
    }
  }
  std::copy_n(sums, count, scores);
}

size_t ExactScores::roundings(const Rows& rows) {
  const size_t lanes = scoring_kernels().lanes, chunks = (rows.d + depth() - 1) / depth();
  return kVectors + lanes + 2 + 2 * rows.L * chunks;
}

}  // namespace trackstar
