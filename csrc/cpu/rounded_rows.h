// Finding the best of many rows of floats by products of whole numbers.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/filter.h"
#include "cpu/rounded_queries.h"
#include "cpu/scoring_kernel.h"
#include "scoring.h"

namespace trackstar {

// Queries as bytes, for rows of floats. Runs of kRun numbers are rounded together, or whole blocks where those are no
// multiple of that.
struct ByteQueries {
  // Queries (Q, L, d), dense, to be there as long; fits(d).
  ByteQueries(const float* values, size_t Q, size_t L, size_t d);

  static constexpr size_t kRun = 256;
  static bool fits(size_t d) { return d % kRun == 0 || d <= kMaxPiece; }

  const float* values;
  size_t runs, size;  // of a block
  RoundedQueries rounded;

  // What rounding left over, rounded once more.
  Aligned<int8_t> codes;        // (Q, L · runs, padded)
  std::vector<int32_t> starts;  // (Q, L · runs)
  std::vector<float> scales;    // (Q, L · runs)
  ScoreBounds bounds;           // of rough scores with that
};

// A search of one thread. Rows are rounded to bytes, tile by tile, and of those that may be among the best by what is
// known of the roundings the scores are computed, with the bits that they have in a Scan.
class ByteSearch : public Filter {
 public:
  ByteSearch(const ByteQueries& queries, const Rows& rows, const std::vector<TopK>& tops);

  void run(size_t begin, size_t end) override;
  size_t tile_rows() const override { return tile_rows_; }

  // Scores that were not ruled out at first.
  double doubted() const { return doubted_; }

 private:
  void round(size_t n, size_t r);
  void multiply(size_t count);
  void consider(Side& side, size_t n, size_t r);

  const ByteQueries& queries_;
  const RoundedQueries& rounded_;
  size_t runs_, run_bytes_, tile_rows_;  // runs of a row
  decltype(RowKernels::widen) widen_;    // null where rows are float32
  Aligned<float> wide_;
  Aligned<uint8_t> bytes_;     // (row of the tile, run, padded)
  std::vector<float> scales_;  // (run, row of the tile)
  std::vector<float> norms_, rests_;
  Aligned<float> scores_;  // (row of the tile, width)
  std::vector<float> upper_;
  std::vector<uint32_t> which_;
  double doubted_ = 0;
};

}  // namespace trackstar
