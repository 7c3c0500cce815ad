// The k best rows of a query among many of which only an upper bound is known.
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

// Rows enter with an upper bound of their score and wait. Now and then the waiting are scored exactly, the most
// promising first, until none that is left can reach the k best. Memory is bounded however loose the bounds.
class Contest {
 public:
  // Rows that score at most `floor`, unless that is a NaN, need not be found.
  Contest(size_t k, size_t rows, float floor)
      : k_(std::min(k, rows)),
        capacity_(std::min(waiting_room(k), rows)),
        due_(std::min(capacity_, turn())),
        floor_(floor) {
    best_.reserve(k_);
    waiting_.reserve(capacity_);
  }

  static size_t waiting_room(size_t k) { return 2 * k + 128; }

  // A row whose bound is at most this cannot be among the best, if its position is larger than all so far. NaN as
  // long as every row can.
  float threshold() const {
    if (best_.size() < k_) return floor_;
    return best_.front().score > floor_ || std::isnan(floor_) ? best_.front().score : floor_;
  }

  // Whether enough are waiting for it to pay to settle some: thresholds rise early, and few are scored in vain.
  bool due() const { return waiting_.size() >= due_; }

  // A NaN stands for no bound at all.
  void enter(float bound, int64_t position) {
    waiting_.push_back({std::isnan(bound) ? std::numeric_limits<float>::infinity() : bound, position});
  }

  // Scores some of those waiting, in groups of which each promises more than the next, until no bound of the others reaches
  // the threshold, or if not `all` are to be settled, until half the room is free: fetch(positions, count), and some time
  // later score(positions, count, scores), for at most kTogether rows.
  template <typename Fetch, typename Score>
  void settle(bool all, Fetch fetch, Score score) {
    const auto hopeless = [&](const Candidate& row) { return row.score < threshold(); };
    const auto promises_more = [](const Candidate& a, const Candidate& b) { return a.score > b.score; };
    const auto dismiss = [&] {
      waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(), hopeless), waiting_.end());
    };
    dismiss();
    while (!waiting_.empty()) {
      const size_t group = std::min(waiting_.size(), group_size());
      std::nth_element(waiting_.begin(), waiting_.begin() + static_cast<ptrdiff_t>(group - 1), waiting_.end(),
                       promises_more);
      int64_t positions[2][kTogether];
      size_t counts[2] = {}, next = 0;
      for (size_t turn = 0; next < group || counts[~turn & 1] > 0; ++turn) {
        // One batch is fetched while the one before it is scored.
        size_t& count = counts[turn & 1];
        for (count = 0; count < kTogether && next < group; ++next) {
          if (!hopeless(waiting_[next])) positions[turn & 1][count++] = waiting_[next].position;
        }
        fetch(positions[turn & 1], count);
        size_t& before = counts[~turn & 1];
        if (before == 0) continue;
        float scores[kTogether];
        score(positions[~turn & 1], before, scores);
        for (size_t i = 0; i < before; ++i) offer({scores[i], positions[~turn & 1][i]});
        scored_ += static_cast<int64_t>(before);
        before = 0;
      }
      waiting_.erase(waiting_.begin(), waiting_.begin() + static_cast<ptrdiff_t>(group));
      dismiss();
      if (!all && waiting_.size() <= capacity_ / 2) break;
    }
    due_ = std::min(capacity_, waiting_.size() + turn());
  }

  // The best found, in no order.
  const std::vector<Candidate>& best() const { return best_; }
  // How many rows were scored.
  int64_t scored() const { return scored_; }

  static constexpr size_t kTogether = 8;

 private:
  void offer(const Candidate& candidate) {
    if (best_.size() < k_) {
      best_.push_back(candidate);
    } else if (better(candidate, best_.front())) {
      std::pop_heap(best_.begin(), best_.end(), better);
      best_.back() = candidate;
    } else {
      return;
    }
    std::push_heap(best_.begin(), best_.end(), better);
  }

  // How many more wait until the next are settled.
  size_t turn() const { return 3 * kTogether + group_size(); }
  size_t group_size() const { return kTogether + k_ / 16; }

  size_t k_, capacity_, due_;
  float floor_;
  std::vector<Candidate> best_;     // a heap, the worst in front
  std::vector<Candidate> waiting_;  // bounds instead of scores
  int64_t scored_ = 0;
};

}  // namespace trackstar
