// Finding the best rows by rough scores, and scoring exactly those that a bound does not rule out.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/coded.h"
#include "cpu/contest.h"
#include "cpu/exact_scores.h"
#include "cpu/scan.h"
#include "scoring.h"

namespace trackstar {

// Rows that are looked for by their codes, and rows of which the answer is.
struct Sought {
  const float* queries;
  Rows codes;
  Rows exact;
  const float* squared_norms;  // of the exact rows, (N, L); null if those are the codes
};

// Whether a query's norm, or a row's largest scale, leaves room for products that neither overflow nor vanish. Others
// have no bounds.
inline bool bounded(float size) { return size == 0 || (size >= 1e-10f && size <= 1e10f); }

// How far a rough score may be from the exact one: wide[q] times the norm of the decoded row, and far[q] times the
// distance between that and the row that is scored exactly.
struct ScoreBounds {
  explicit ScoreBounds(size_t Q) : wide(Q), far(Q) {}

  // Of a query whose values have this sum of squares, of which rounding it loses `lost`; scores, rough and exact, are
  // rounded no more than `roundings` times one after another.
  void set(size_t query, double squares, double lost, size_t roundings);

  std::vector<float> wide, far;
};

class Filter : public Search {
 public:
  Filter(const Sought& sought, const std::vector<TopK>& tops);

  void finish() override;
  void collect(size_t top, size_t query, std::vector<Key>& keys) const override {
    for (const Candidate& candidate : sides_[top].contests[query].best()) {
      keys.push_back(key_of(candidate.score, static_cast<uint32_t>(candidate.position)));
    }
  }
  int64_t rescored(size_t top, size_t query) const override { return sides_[top].contests[query].scored(); }

 protected:
  // One of the results: the largest scores, or the smallest, which are the largest once negated.
  struct Side {
    ExactScores exact;
    float sign;
    std::vector<Contest> contests;
    std::vector<float> thresholds;  // that a bound must exceed, by query
  };

  // Rows enter in ascending order for each query.
  void enter(Side& side, size_t query, float bound, size_t row) {
    side.contests[query].enter(bound, static_cast<int64_t>(row));
    if (side.contests[query].due()) settle(side, query, false);
  }

  const float* scales(size_t n) const { return rows_.scales ? rows_.scales + n * rows_.L : ones_.data(); }

  // A decoded row's norm, rounded up, from its square or from its scales alone; NaN if there is no bound.
  static float norm_of(double square, float largest_scale) {
    // 1.01 is for codes of -128, which count as -127 · 128, and for rounding.
    return bounded(largest_scale) ? 1.01f * std::sqrt(static_cast<float>(square)) : kUnbounded;
  }
  float norm_of(size_t n, double square) const;
  float most_norm(size_t n) const;
  // The distance between a decoded row and the one that is scored exactly, rounded up, from the former's square.
  float rest_of(size_t n, double square) const;

  const Sought sought_;
  const Rows& rows_;
  const CodedKernels& kernels_;
  std::vector<Side> sides_;

 private:
  static constexpr float kUnbounded = std::numeric_limits<float>::quiet_NaN();

  void settle(Side& side, size_t query, bool all);

  std::vector<float> ones_;  // for rows without scales
};

}  // namespace trackstar
