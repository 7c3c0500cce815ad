// Keeping the k best of a stream of scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace trackstar {

// A score and a position in one number: results are in the order of their keys, larger scores first, NaN last, ties to
// the smaller position.
using Key = uint64_t;

inline Key key_of(float score, uint32_t position) {
  uint32_t bits = ~uint32_t{0};
  if (!std::isnan(score)) {
    score += 0.0f;  // no minus zero
    std::memcpy(&bits, &score, sizeof bits);
    // As whole numbers, floats are in order from zero to infinity, and in reverse below zero.
    bits = bits >> 31 ? bits : ~bits & 0x7FFFFFFF;
  }
  return Key{bits} << 32 | position;
}

inline float score_of(Key key) {
  auto bits = static_cast<uint32_t>(key >> 32);
  if (!(bits >> 31)) bits = ~bits & 0x7FFFFFFF;
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

inline uint32_t position_of(Key key) { return static_cast<uint32_t>(key); }

// What a score must exceed to be looked for, negated where the smallest are wanted: `reached` itself is still of use,
// as ties go to the smaller position. NaN where nothing is known.
inline float floor_of(const float* reached, size_t query, bool largest) {
  if (reached == nullptr || !std::isfinite(reached[query])) return std::numeric_limits<float>::quiet_NaN();
  return std::nextafter(largest ? reached[query] : -reached[query], -std::numeric_limits<float>::infinity());
}

// The k best of what was offered so far, among some that were not yet weeded out. Positions come in ascending order,
// so a score that only equals the threshold has lost its tie.
class Reservoir {
 public:
  // Scores that are at most `floor`, unless that is a NaN, are of no interest.
  Reservoir(size_t k, size_t share, size_t offers, float floor)
      : k_(k), share_(share), capacity_(std::min(capacity(k), offers)), threshold_(floor) {
    keys_.reserve(capacity_);
  }

  // Most keys held for k results: room to weed seldom, few enough for the threshold to follow.
  static size_t capacity(size_t k) { return k + k / 4 + 4; }

  // A NaN threshold, which it is until something is known, lets everything through.
  bool wants(float score) const { return !(score <= threshold_); }
  float threshold() const { return threshold_; }
  // Scores that are at most `floor` are of no interest any more.
  void raise(float floor) { threshold_ = wants(floor) ? floor : threshold_; }

  // Returns whether others were weeded out for it.
  bool add(float score, uint32_t position) {
    const bool full = keys_.size() == capacity_;
    if (full) weed();
    keys_.push_back(key_of(score, position));
    return full;
  }

  const std::vector<Key>& keys() const { return keys_; }

  // What `share` of them scored at least when they were last weeded, -∞ if that is not known.
  float best() const { return best_; }

 private:
  void weed() {
    auto kth = keys_.begin() + static_cast<ptrdiff_t>(k_ - 1);
    std::nth_element(keys_.begin(), kth, keys_.end());
    const float score = score_of(*kth);
    if (wants(score) && !std::isnan(score)) threshold_ = score;
    keys_.resize(k_);
    const auto last = keys_.begin() + static_cast<ptrdiff_t>(share_ - 1);
    std::nth_element(keys_.begin(), last, keys_.end());
    const float best = score_of(*last);
    if (best > best_) best_ = best;
  }

  size_t k_, share_;
  size_t capacity_;
  float threshold_;
  float best_ = -std::numeric_limits<float>::infinity();
  std::vector<Key> keys_;
};

}  // namespace trackstar
