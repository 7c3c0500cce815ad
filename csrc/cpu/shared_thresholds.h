// What the threads of a scan tell each other.
#pragma once

#include <atomic>
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

  // The best such score, -∞ while there is none. Equal scores are still of interest, as they may have smaller positions.
  float score(size_t top, size_t query) const {
    return scores_[top * Q_ + query].load(std::memory_order_relaxed);
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  size_t Q_;
  std::vector<std::atomic<float>> scores_;
};

}  // namespace trackstar
