// Exact scores of chosen rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/coded_kernel.h"
#include "cpu/scoring_kernel.h"
#include "scoring.h"

namespace trackstar {

// Each score has the bits that score_topk gives it when it is called with that query alone.
class ExactScores {
 public:
  // Queries (Q, L, d), dense; scores are multiplied by `sign`.
  ExactScores(const float* queries, const Rows& rows, float sign);

  static constexpr size_t kTogether = kExactRows;

  // Begins to fetch rows that will be scored soon.
  void fetch(const int64_t* positions, size_t count) const;

  // Scores of one query with `count` rows, at most kTogether.
  void score(size_t query, const int64_t* positions, size_t count, float* scores) const;

  // Roundings that a score goes through, one after another.
  static size_t roundings(const Rows& rows);

 private:
  void score_codes(const float* values, const int64_t* positions, size_t count, float* scores) const;

  const float* queries_;
  Rows rows_;
  float sign_;
  size_t depth_, block_bytes_, row_bytes_;
  decltype(CodeKernels::exact) exact_;  // of narrow rows; null for others
  decltype(DotKernel::run) dot_;
};

}  // namespace trackstar
