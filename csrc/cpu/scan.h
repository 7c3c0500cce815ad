// Scoring rows tile by tile and keeping the best, on all threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/cache.h"
#include "cpu/reservoir.h"
#include "cpu/scoring_kernel.h"
#include "cpu/shared_thresholds.h"
#include "scoring.h"

namespace trackstar {

// One thread's share of the rows: its working memory, and the best it has seen for each query.
class Search {
 public:
  virtual ~Search() = default;

  // Looks at rows begin … end - 1. Calls come in ascending order, and end with finish().
  virtual void run(size_t begin, size_t end) = 0;
  virtual void finish() {}

  // Rows that are looked at together.
  virtual size_t tile_rows() const = 0;
  // Adds the best for the query under tops[top], maybe with others; scores are negated where the smallest are
  // wanted.
  virtual void collect(size_t top, size_t query, std::vector<Key>& keys) const = 0;
  // How many rows were scored a second time for that query.
  virtual int64_t rescored(size_t, size_t) const { return 0; }
};

// A search that scores every row.
class Scan : public Search {
 public:
  // `width` columns of scores, of which the first are the queries'; `tile_rows` rows are scored together. All threads
  // share the same thresholds.
  Scan(const std::vector<TopK>& tops, size_t N, size_t width, size_t tile_rows, SharedThresholds& shared);

  void run(size_t begin, size_t end) final;
  size_t tile_rows() const final { return tile_rows_; }
  void collect(size_t top, size_t query, std::vector<Key>& keys) const final {
    const std::vector<Key>& found = selections_[top].reservoirs[query].keys();
    keys.insert(keys.end(), found.begin(), found.end());
  }

 protected:
  // Offers what may be of interest in a tile: by default all of it is scored.
  virtual void look(size_t row, size_t count);
  // Adds the scores of a tile to scores_, which are zero.
  virtual void score(size_t row, size_t count) = 0;
  // Whether a row of that tile takes part.
  virtual bool valid(size_t) const { return true; }

  void offer(size_t query, float score, uint32_t position);
  // Whether there is a threshold for every query.
  bool settled() const { return unsettled_ == 0; }

  const ScoringKernels& kernels_;
  const size_t width_;
  Aligned<float> scores_;  // (row of the tile, width)
  // A score that is at most the one and at least the other is of no interest.
  Aligned<float> above_, below_;
  std::vector<uint32_t> interesting_;

 private:
  struct Selection {
    bool largest;
    std::vector<Reservoir> reservoirs;
  };

  // Takes over what other threads know.
  void catch_up();
  // A result's threshold for a query, after it has changed.
  void set_threshold(size_t top, size_t query, bool was_known);

  size_t tile_rows_;
  SharedThresholds& shared_;
  size_t thread_;
  std::vector<Selection> selections_;
  size_t unsettled_ = 0;
};

// Rows to score together, given the rows that a kernel takes at once and the bytes of all that they are multiplied
// with: no more than those if that stays in the second-level cache, otherwise enough to be worth reading it again.
inline size_t rows_of_tile(size_t block_rows, size_t matrix_bytes) {
  constexpr size_t kTileRows = 48;
  return matrix_bytes <= second_level_cache() / 2 ? (block_rows == 1 ? 4 : block_rows) : kTileRows;
}

// Runs the searches over all N rows, each on a thread of its own, and merges what they found.
void run_scans(const std::vector<std::unique_ptr<Search>>& scans, size_t N, const std::vector<TopK>& tops);

// As many scans, made by `make`, as threads have something to do. All memory is taken before they start, where
// running out of it is an ordinary exception.
template <typename Make>
std::vector<std::unique_ptr<Search>> make_scans(size_t N, int threads, Make make) {
  std::vector<std::unique_ptr<Search>> scans;
  do {
    scans.push_back(make());
  } while (scans.size() < static_cast<size_t>(threads) && scans.size() * scans.front()->tile_rows() < N);
  return scans;
}

template <typename Make>
void run_scans(size_t N, const std::vector<TopK>& tops, int threads, Make make) {
  run_scans(make_scans(N, threads, make), N, tops);
}

}  // namespace trackstar
