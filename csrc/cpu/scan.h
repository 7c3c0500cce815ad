// Scoring rows tile by tile and keeping the best, on all threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/reservoir.h"
#include "cpu/scoring_kernel.h"
#include "scoring.h"

namespace trackstar {

// One thread's share of the rows: its working memory, and the best it has seen for each query.
class Scan {
 public:
  // `width` columns of scores, of which the first are the queries'; `tile_rows` rows are scored together.
  Scan(const std::vector<TopK>& tops, size_t N, size_t width, size_t tile_rows);
  virtual ~Scan() = default;

  // Scores rows begin … end - 1. Calls come in ascending order.
  void run(size_t begin, size_t end);

  size_t tile_rows() const { return tile_rows_; }
  // Those of the query under tops[top], their scores negated where the smallest are wanted.
  const std::vector<Candidate>& candidates(size_t top, size_t query) const {
    return selections_[top].reservoirs[query].candidates();
  }

 protected:
  // Adds the scores of a tile to scores_, which are zero.
  virtual void score(size_t row, size_t count) = 0;
  // Whether a row of that tile takes part.
  virtual bool valid(size_t) const { return true; }

  const ScoringKernels& kernels_;
  const size_t width_;
  Aligned<float> scores_;  // (row of the tile, width)

 private:
  struct Selection {
    bool largest;
    std::vector<Reservoir> reservoirs;
  };

  void offer(size_t query, float score, int64_t position);

  size_t tile_rows_;
  std::vector<Selection> selections_;
  // A score that is at most the one and at least the other is of no interest.
  Aligned<float> above_, below_;
  std::vector<uint32_t> interesting_;
};

// Rows to score together, given the rows that a kernel takes at once and the bytes of all that they are multiplied
// with: no more than those if that stays in the second-level cache, otherwise enough to be worth reading it again.
inline size_t rows_of_tile(size_t block_rows, size_t matrix_bytes) {
  constexpr size_t kCacheBytes = 512 << 10, kTileRows = 48;
  return matrix_bytes <= kCacheBytes ? block_rows : kTileRows;
}

// Runs the scans over all N rows, each on a thread of its own, and merges what they found.
void run_scans(const std::vector<std::unique_ptr<Scan>>& scans, size_t N, const std::vector<TopK>& tops);

// The same with as many scans, made by `make`, as threads have something to do. All memory is taken before they
// start, where running out of it is an ordinary exception.
template <typename Make>
void run_scans(size_t N, const std::vector<TopK>& tops, int threads, Make make) {
  std::vector<std::unique_ptr<Scan>> scans;
  do {
    scans.push_back(make());
  } while (scans.size() < static_cast<size_t>(threads) && scans.size() * scans.front()->tile_rows() < N);
  run_scans(scans, N, tops);
}

}  // namespace trackstar
