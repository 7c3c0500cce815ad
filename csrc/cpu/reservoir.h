// Keeping the k best of a stream of scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace trackstar {

struct Candidate {
  float score;
  int64_t position;
};

// The order of results: larger scores first, NaN last, ties to the smaller position.
inline bool better(const Candidate& a, const Candidate& b) {
  if (a.score > b.score) return true;
  if (a.score < b.score) return false;
  bool a_nan = std::isnan(a.score), b_nan = std::isnan(b.score);
  if (a_nan != b_nan) return b_nan;
  return a.position < b.position;
}

// The k best of the candidates offered so far, among some that were not yet weeded out. Positions come in
// ascending order, so a candidate that only equals the threshold has lost its tie.
class Reservoir {
 public:
  Reservoir(size_t k, size_t offers) : k_(k), capacity_(std::min(capacity(k), offers)) {
    candidates_.reserve(capacity_);
  }

  // Most candidates held for k results: room to weed seldom, few enough for the threshold to follow.
  static size_t capacity(size_t k) { return 2 * k + 64; }

  // A NaN threshold, which it is until something is known, lets everything through.
  bool wants(float score) const { return !(score <= threshold_); }
  float threshold() const { return threshold_; }

  void add(float score, int64_t position) {
    if (candidates_.size() == capacity_) weed();
    candidates_.push_back({score, position});
  }

  const std::vector<Candidate>& candidates() const { return candidates_; }

 private:
  void weed() {
    auto kth = candidates_.begin() + static_cast<ptrdiff_t>(k_ - 1);
    std::nth_element(candidates_.begin(), kth, candidates_.end(), better);
    threshold_ = kth->score;
    candidates_.resize(k_);
  }

  size_t k_;
  size_t capacity_;
  float threshold_ = std::numeric_limits<float>::quiet_NaN();
  std::vector<Candidate> candidates_;
};

}  // namespace trackstar
