// Products of stored rows with a matrix.
#pragma once

#include <algorithm>
#include <cstddef>

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

  // `tile_rows` is how far on the next tile is.
  RowReader(const Rows& rows, size_t tile_rows);

  // out (count, stride) += block b of rows row … row + count - 1 times block `matrix_b` of a matrix; if that has
  // panels, of panels begin … end - 1.
  void multiply(size_t row, size_t count, size_t b, const Matrix& matrix, size_t matrix_b, size_t begin,
                size_t end, float* out, size_t stride);

 private:
  void multiply_few(size_t row, size_t count, size_t b, const Matrix& matrix, size_t matrix_b, float* out,
                    size_t stride) const;
  const char* at(size_t n, size_t i) const;
  const char* ahead(size_t n, size_t i) const;
  float scale(size_t n, size_t b) const;
  const float* single(const char* stored, size_t depth, int r);

  const Rows rows_;
  const ScoringKernels& kernels_;
  const RowKernels& type_;
  size_t bytes_;  // of a number
  size_t tile_rows_;
  Aligned<float> wide_;  // a block of rows as floats, if they are stored as something else
};

}  // namespace trackstar
