// What the threads of a scan tell each other.
#pragma once

#include <atomic>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace trackstar {

// For each query of each result a score that k rows have, on whatever thread, negated where the smallest are wanted.
class SharedThresholds {
 public:
  SharedThresholds(size_t tops, size_t Q) : Q_(Q), scores_(tops * Q) {
    for (auto& score : scores_) score.store(-kInfinity, std::memory_order_relaxed);
  }

  // That k rows have this score.
  void raise(size_t top, size_t query, float score) {
    std::atomic<float>& best = scores_[top * Q_ + query];
    float known = best.load(std::memory_order_relaxed);
    while (score > known && !best.compare_exchange_weak(known, score, std::memory_order_relaxed)) {
    }
  }

  // What a score must exceed to be of interest, -∞ while nothing is known: equal ones may have smaller positions.
  float floor(size_t top, size_t query) const {
    return std::nextafter(scores_[top * Q_ + query].load(std::memory_order_relaxed), -kInfinity);
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  size_t Q_;
  std::vector<std::atomic<float>> scores_;
};

}  // namespace trackstar
