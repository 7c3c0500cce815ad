// Products of stored rows with a matrix.
#pragma once

#include <cstddef>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/matrix.h"
#include "cpu/scoring_kernel.h"
#include "scoring.h"

namespace trackstar {

// Reads rows tile by tile. Kernels take whole blocks of rows: past the end of a tile its last row stands in, and
// what becomes of that is not looked at, so results need room for whole blocks.
class RowReader {
 public:
  static constexpr size_t kDepth = 256;  // numbers that a panel kernel sums one after another: see scoring.h

  RowReader(const Rows& rows, size_t tile_rows);

  // Goes to the tile of rows row … row + count - 1, at most tile_rows.
  void open(size_t row, size_t count);

  // out (count, stride) += block b of the tile's rows times block `matrix_b` of a matrix; if that has panels, of
  // panels begin … end - 1.
  void multiply(size_t b, const Matrix& matrix, size_t matrix_b, size_t begin, size_t end, float* out,
                size_t stride);

 private:
  void multiply_few(size_t b, const Matrix& matrix, size_t matrix_b, float* out, size_t stride) const;
  const char* at(size_t n) const;
  void scales(size_t b, size_t first, size_t block_rows, float* out) const;

  const Rows rows_;
  const ScoringKernels& kernels_;
  const RowKernels& type_;
  size_t bytes_;  // of a number
  size_t tile_rows_;
  size_t row_ = 0, count_ = 0;
  std::vector<const char*> tile_, next_tile_;  // where rows of the tile and of the next begin
  Aligned<float> wide_;  // a block of rows as floats, if they are stored as something else
};

}  // namespace trackstar
