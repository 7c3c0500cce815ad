// The forms that project_gradients takes, and what they share: how a batch is cut up. Examples are cut at fixed
// places and every sum runs in one order, so a result is the same in any batch and on any number of threads.
#pragma once

#include <vector>

#include "cpu/gradient_kernel.h"
#include "cpu/panels.h"
#include "gradient.h"

namespace trackstar {

// Blocks and quarters of them are whole tiles at every level, and an X panel of kDepth tokens fits in L1.
constexpr int64_t kRowBlock = 96;
constexpr int64_t kColumnBlock = 192;
constexpr int64_t kDepth = 256;  // most terms of one chain of additions

// Longer examples are summed piece by piece, which bounds the scratch memory. Short ones are taken up to
// eight at a time, which share a block of the scale while it is in cache.
constexpr int64_t kPieceTokens = 1024;
constexpr int64_t kPartPieces = 8;
constexpr int64_t kPartRows = kPieceTokens + kPartPieces;

// The one number that is not zero of every column of CountSketches (rank, rows, columns), as (rank, padded); or
// nothing, if a column has more of them.
std::vector<Bucket> buckets_of(const float* sketches, int64_t rank, int64_t rows, int64_t columns,
                               int64_t padded);

// Without a scale.
void project_folded(const GradientBatch& batch, float* out, int threads);

// With a scale and any left sketch.
void project_dense(const GradientBatch& batch, float* out, int threads);

// With a scale and left in buckets, (rank, O rounded up to kRowBlock).
void project_countsketch(const GradientBatch& batch, const std::vector<Bucket>& buckets, float* out,
                         int threads);

// What all forms know about a call.
class Projection {
 protected:
  Projection(const GradientBatch& batch, float* out, int threads);

  // Number `index` of the activations or output gradients.
  const void* at(const void* matrix, int64_t index) const {
    return static_cast<const char*>(matrix) + index * (x_.element == Element::float32 ? 4 : 2);
  }

  // The size of blocks to cut each of `parts` into, which are `size` wide: `block`, or down to a quarter of it where
  // some threads would idle. The blocks of tasks are no part of any sum, so results do not depend on it.
  int64_t block_for_threads(int64_t size, int64_t block, int64_t parts) const;

  // Rows [row, row + kernels_.rows) of one example's result, from a strip with rows of padded_p_.
  void write(int64_t example, int64_t row, const float* strip, bool add) const;

  const GradientBatch x_;
  float* const out_;
  const int threads_;
  const GradientKernels& kernels_;
  const ElementKernels& of_element_;
  const int64_t padded_p_;
};

// A run of tokens of one example; `begin` counts over the whole batch.
struct Piece {
  int64_t example, begin, tokens;
  bool first;
};

// Consecutive items [begin, end) of a list.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The batch cut into pieces, parts (runs of pieces that one thread takes together) and waves (runs of parts
// that are in memory together, enough to keep every thread busy). Pieces of one example add to the same
// result, so no wave holds two of them.
class ScaledProjection : protected Projection {
 protected:
  // A part is cut into tasks_of_part for the threads.
  ScaledProjection(const GradientBatch& batch, float* out, int threads, int64_t tasks_of_part);

  Range pieces_of(const Range& wave) const { return {parts_[wave.begin].begin, parts_[wave.end - 1].end}; }

  // Packed Δ and X have one spare row after each piece: panels of a power of two would all fall on the same
  // cache sets.
  int64_t row_of(int64_t piece) const { return pieces_[piece].begin + piece; }
  int64_t rows_of(const Range& run) const {
    return row_of(run.end - 1) + pieces_[run.end - 1].tokens + 1 - row_of(run.begin);
  }
  // Rows of a panel that packed tokens really take.
  int64_t steps_of(int64_t tokens) const { return (tokens + of_element_.terms - 1) / of_element_.terms; }
  // Most rows and pieces of any wave.
  int64_t most_rows() const;
  int64_t most_pieces() const;

  // Where columns [column, column + kColumnBlock) of a piece's X stand, packed, among those of its wave.
  float* packed_columns(int64_t piece, int64_t column, const Range& run, const Buffer& columns) const {
    return columns.at((row_of(piece) - row_of(run.begin)) * padded_in_ +
                      column * (pieces_[piece].tokens + 1));
  }
  void pack_columns(int64_t piece, int64_t column, const Range& run, const Buffer& columns) const;

  const int64_t padded_in_;
  std::vector<Piece> pieces_;
  std::vector<Range> parts_, waves_;
};

}  // namespace trackstar
