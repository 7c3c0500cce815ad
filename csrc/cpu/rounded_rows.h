// Telling by products of whole numbers which scores of rows of floats are worth computing.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/ahead.h"
#include "cpu/aligned.h"
#include "cpu/rounded_queries.h"
#include "cpu/scoring_kernel.h"
#include "scoring.h"

namespace trackstar {

// Many queries as bytes, for rows of floats, and as they are, in the layout of ScoringKernels::score_row. Runs of kRun
// numbers are rounded together, or whole blocks where those are no multiple of that.
struct ByteQueries {
  // Queries (Q, L, d), dense; fits(Q, d).
  ByteQueries(const float* values, size_t Q, size_t L, size_t d);

  static constexpr size_t kRun = 256, kLeast = 17;
  // Whether they can be rounded, and whether that may save more than it costs.
  static bool fits(size_t Q, size_t d);

  size_t L, d;
  size_t runs, size;  // of a block
  RoundedQueries rounded;

  Aligned<float> values;
  size_t stride;  // of one query's values

 private:
  void lay_across(const float* given, size_t Q);
};

// The rows of one thread, rounded to bytes tile by tile. Of those scores that may be of interest, by what is known of the
// roundings, each is computed by itself.
class ByteRows {
 public:
  ByteRows(const ByteQueries& queries, const Rows& rows);

  // Rows of a tile.
  size_t tile_rows() const { return tile_rows_; }

  // Goes to the tile of rows row … row + count - 1.
  void open(size_t row, size_t count);

  // The queries for which the score of the tile's row r may be neither at most `above` nor at least `below`, each its
  // own: they are written to `which`, in order; returns how many.
  size_t doubtful(size_t r, const float* above, const float* below, uint32_t* which) const;

  // Score of the tile's row r, with the bits that it has in any scan of many queries.
  float score(size_t r, size_t query);

 private:
  void round(size_t r, const FetchLines& fetch);
  const float* scales(size_t r) const {
    return rows_.scales ? rows_.scales + (row_ + r) * rows_.L : ones_.data();
  }

  const ByteQueries& queries_;
  const RoundedQueries& rounded_;
  const Rows rows_;
  const CodedKernels& kernels_;
  size_t runs_, tile_rows_;            // runs of a row
  decltype(RowKernels::widen) widen_;  // null where rows are float32
  size_t row_ = 0;
  size_t stride_;              // of bytes
  Aligned<uint8_t> bytes_;     // (row of the tile, run, padded)
  std::vector<float> scales_;  // (run, row of the tile)
  std::vector<float> norms_, rests_;
  Aligned<float> scores_;  // (row of the tile, width): rough ones
  Aligned<float> wide_;    // a row, if it is not float32 as it is stored
  size_t widened_;         // which one
  std::vector<float> sums_, ones_;
};

}  // namespace trackstar
