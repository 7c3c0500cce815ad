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

ExactScores::ExactScores(const float* queries, const Rows& rows, float sign)
    : queries_(queries),
      rows_(rows),
      sign_(sign),
      depth_(depth()),
      block_bytes_(block_bytes(rows.type, rows.d)),
      row_bytes_(rows.L * block_bytes_),
      exact_(is_coded(rows.type) ? code_kernels(rows.type).exact : nullptr),
      dot_(row_kernels(rows.type).dot[0].run) {}

void ExactScores::fetch(const int64_t* positions, size_t count) const {
  for (size_t r = 0; r < count; ++r) prefetch(row_at(rows_, positions[r]), std::min(kAhead, row_bytes_));
}

void ExactScores::score(size_t query, const int64_t* positions, size_t count, float* scores) const {
  const float* values = queries_ + query * rows_.L * rows_.d;
  if (exact_) {
    score_codes(values, positions, count, scores);
    return;
  }
  const float ones[1] = {1.0f};
  for (size_t r = 0; r < count; ++r) {
    const uint8_t* row = row_at(rows_, positions[r]);
    float score = 0;
    const float* query_block = values;
    for (size_t b = 0; b < rows_.L; ++b) {
      const float* scale = rows_.scales ? rows_.scales + positions[r] * rows_.L + b : ones;
      for (size_t i = 0; i < rows_.d; i += depth_) {
        const size_t n = std::min(depth_, rows_.d - i);
        const void* at = row + b * block_bytes_ + block_bytes(rows_.type, i);
        dot_(&at, {nullptr, 0, false}, query_block, {1, n, n}, &scale, &score, 1);
        query_block += n;
      }
    }
    scores[r] = sign_ * score;
  }
}

void ExactScores::score_codes(const float* values, const int64_t* positions, size_t count,
                              float* scores) const {
  const uint8_t* rows[kTogether];
  const float* scales[kTogether];
  for (size_t r = 0; r < kTogether; ++r) {
    const size_t position = positions[std::min(r, count - 1)];
    rows[r] = row_at(rows_, position);
    scales[r] = rows_.scales ? rows_.scales + position * rows_.L : nullptr;
  }
  float sums[kTogether] = {};
  for (size_t b = 0; b < rows_.L; ++b) {
    float scale[kTogether];
    for (size_t r = 0; r < kTogether; ++r) scale[r] = scales[r] ? sign_ * scales[r][b] : sign_;
    for (size_t i = 0; i < rows_.d; i += depth_) {
      const size_t n = std::min(depth_, rows_.d - i), bytes = block_bytes(rows_.type, i);
      const uint8_t* at[kTogether];
      for (size_t r = 0; r < kTogether; ++r) {
        at[r] = rows[r] + b * block_bytes_ + bytes;
        if (row_bytes_ > kAhead && r < count) prefetch(at[r] + kAhead, block_bytes(rows_.type, n));
      }
      exact_(at, values, n, scale, sums);
      values += n;
    }
  }
  std::copy_n(sums, count, scores);
}

size_t ExactScores::roundings(const Rows& rows) {
  const size_t lanes = scoring_kernels().lanes, chunks = (rows.d + depth() - 1) / depth();
  return kVectors + lanes + 2 + 2 * rows.L * chunks;
}

}  // namespace trackstar
