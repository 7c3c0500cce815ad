// Exact scores of chosen rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/coded_kernel.h"
#include "scoring.h"

namespace trackstar {

// Each score has the bits that score_topk gives it when it is called with that query alone.
class ExactScores {
 public:
  // Queries (Q, L, d), dense; scores are multiplied by `sign`.
  ExactScores(const float* queries, const Rows& rows, float sign)
      : queries_(queries), rows_(rows), sign_(sign) {}

  // Scores of one query with `count` rows, at most kTogether.
  void score(size_t query, const int64_t* positions, size_t count, float* scores) const;

  // Roundings that a score goes through, one after another.
  static size_t roundings(const Rows& rows);

  static constexpr size_t kTogether = kExactRows;

 private:
  const float* queries_;
  Rows rows_;
  float sign_;
};

}  // namespace trackstar
