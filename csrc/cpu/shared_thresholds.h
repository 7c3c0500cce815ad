// What the threads of a scan tell each other.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <limits>
#include <vector>

#include "scoring.h"

namespace trackstar {

// For each query of each result a score that k rows have, on whatever threads, negated where the smallest are wanted.
//
// Every thread finds k rows by itself in time, but all of them together have found k long before: as soon as each has
// its share of them. Where there are more threads than k, several take one place.
class SharedThresholds {
 public:
  SharedThresholds(const std::vector<TopK>& tops, int threads) {
    for (const TopK& top : tops) {
      const size_t places = std::min(static_cast<size_t>(threads), top.k);
      results_.emplace_back((top.k + places - 1) / places, top.Q, places);
    }
  }

  // The next thread's number.
  size_t join() { return joined_++; }

  // How many rows are a thread's share of k.
  size_t share(size_t top) const { return results_[top].share; }

  // That k rows have `score`, and a share of them, all of this thread's, `best`.
  void raise(size_t top, size_t query, float score, size_t thread, float best) {
    Result& result = results_[top];
    raise(result.scores[query], score);
    std::atomic<float>* places = result.places.data() + query * result.count;
    raise(places[thread % result.count], best);
    float least = best;
    for (size_t i = 0; i < result.count; ++i)
      least = std::min(least, places[i].load(std::memory_order_relaxed));
    raise(result.scores[query], least);
  }

  // The best score that is known of k rows, -∞ while there is none. Equal scores are still of interest, as they may have
  // smaller positions.
  float score(size_t top, size_t query) const {
    return results_[top].scores[query].load(std::memory_order_relaxed);
  }

 private:
  using Scores = std::vector<std::atomic<float>>;

  struct Result {
    Result(size_t share, size_t Q, size_t count) : share(share), count(count), scores(Q), places(Q * count) {
      for (Scores* all : {&scores, &places}) {
        for (auto& score : *all)
          score.store(-std::numeric_limits<float>::infinity(), std::memory_order_relaxed);
      }
    }

    size_t share, count;
    Scores scores;  // of k rows, by query
    Scores places;  // (query, place): of a share
  };

  static void raise(std::atomic<float>& best, float score) {
    float known = best.load(std::memory_order_relaxed);
    while (score > known && !best.compare_exchange_weak(known, score, std::memory_order_relaxed)) {
    }
  }

  std::vector<Result> results_;
  size_t joined_ = 0;
};

}  // namespace trackstar
