// Products of stored rows with a matrix.
#pragma once

#include <cstddef>
#include <vector>

#include "cpu/ahead.h"
#include "cpu/aligned.h"
#include "cpu/coded.h"
#include "cpu/matrix.h"
#include "cpu/scoring_kernel.h"
#include "scoring.h"

namespace trackstar {

// Reads rows tile by tile. Kernels take whole blocks of rows: past the end of a tile its last row stands in, and
// what becomes of that is not looked at, so results need room for whole blocks.
class RowReader {
 public:
  RowReader(const Rows& rows, size_t tile_rows);

  // Goes to the tile of rows row … row + count - 1, at most tile_rows.
  void open(size_t row, size_t count);

  // out (count, stride) += block b of the tile's rows times block `matrix_b` of a matrix; if that has panels, of
  // panels begin … end - 1.
  void multiply(size_t b, const Matrix& matrix, size_t matrix_b, size_t begin, size_t end, float* out,
                size_t stride);
  // All blocks of the rows times those of the matrix.
  void multiply(const Matrix& matrix, size_t begin, size_t end, float* out, size_t stride);

 private:
  // Blocks b … b + count - 1 times as many of a matrix from matrix_b on, all at once where they can be.
  void multiply_few(size_t b, size_t count, const Matrix& matrix, size_t matrix_b, float* out, size_t stride);
  const char* at(size_t n) const { return reinterpret_cast<const char*>(row_at(rows_, n)); }
  void widen_row(const void* stored, size_t n, float* out) const;
  void scales(size_t b, size_t first, size_t block_rows, float* out) const;

  const Rows rows_;
  const ScoringKernels& kernels_;
  const RowKernels& type_;
  const CodeKernels* codes_;  // of narrow rows; null for others
  size_t block_bytes_;
  size_t tile_rows_;
  size_t row_ = 0, count_ = 0;
  std::vector<const char*> tile_;  // where its rows begin
  Ahead ahead_;
  Aligned<float> wide_;      // a block of rows as floats, if kernels do not take them as they are stored
  std::vector<float> ones_;  // for rows without scales
};

}  // namespace trackstar
