#include "cpu/row_reader.h"

namespace trackstar {
namespace {

constexpr size_t kAheadBytes = 1024;  // what is fetched before a panel kernel reads it
constexpr size_t kLineBytes = 64;

const RowKernels& row_kernels(RowType type) {
  const ScoringKernels& kernels = scoring_kernels();
  return type == RowType::float32   ? kernels.single
         : type == RowType::float16 ? kernels.half
                                    : kernels.bfloat16;
}

}  // namespace

RowReader::RowReader(const Rows& rows, size_t tile_rows)
    : rows_(rows),
      kernels_(scoring_kernels()),
      type_(row_kernels(rows.type)),
      bytes_(rows.type == RowType::float32 ? 4 : 2),
      tile_rows_(tile_rows),
      wide_(rows.type == RowType::float32 ? 0 : kMaxBlockRows * kDepth) {}

void RowReader::multiply(size_t row, size_t count, size_t b, const Matrix& matrix, size_t matrix_b,
                         size_t begin, size_t end, float* out, size_t stride) {
  if (matrix.panels().empty()) {
    multiply_few(row, count, b, matrix, matrix_b, out, stride);
    return;
  }
  const size_t block_rows = matrix.block_rows();
  // Each panel's turn fetches its share of the rows, so that memory is asked steadily.
  const size_t share = (block_rows + (end - begin) - 1) / (end - begin);
  for (size_t i = 0; i < rows_.d; i += kDepth) {
    const size_t depth = std::min(kDepth, rows_.d - i);
    for (size_t first = 0; first < count; first += block_rows) {
      const float* rows[kMaxBlockRows];
      const char* next[kMaxBlockRows];
      float scales[kMaxBlockRows];
      for (size_t r = 0; r < block_rows; ++r) {
        const size_t n = row + std::min(first + r, count - 1);
        rows[r] = single(at(n, b * rows_.d + i), depth, static_cast<int>(r));
        next[r] = ahead(n, b * rows_.d + i);
        scales[r] = scale(n, b);
      }
      size_t fetched = 0;
      for (size_t p = begin; p < end; ++p) {
        const Matrix::Panel& panel = matrix.panels()[p];
        const size_t fetches = std::min(share, block_rows - fetched);
        panel.kernel->run(rows, matrix.panel_at(panel, matrix_b, i), depth,
                          {next + fetched, static_cast<int>(fetches), kLineBytes / bytes_}, scales,
                          out + first * stride + panel.first, stride);
        fetched += fetches;
      }
    }
  }
}

void RowReader::multiply_few(size_t row, size_t count, size_t b, const Matrix& matrix, size_t matrix_b,
                             float* out, size_t stride) const {
  const DotKernel& kernel = type_.dot[matrix.count() - 1];
  const size_t block_rows = kernel.rows, max_depth = kDepth * kernels_.lanes;
  for (size_t first = 0; first < count; first += block_rows) {
    for (size_t i = 0; i < rows_.d; i += max_depth) {
      const size_t depth = std::min(max_depth, rows_.d - i), end = b * rows_.d + i + depth;
      const void *rows[kMaxBlockRows], *next[kMaxBlockRows];
      float scales[kMaxBlockRows];
      for (size_t r = 0; r < block_rows; ++r) {
        const size_t n = row + std::min(first + r, count - 1);
        rows[r] = at(n, b * rows_.d + i);
        next[r] = end < rows_.L * rows_.d ? at(n, end) : at(std::min(n + tile_rows_, rows_.N - 1), 0);
        scales[r] = scale(n, b);
      }
      kernel.run(rows, next, matrix.interleaved_at(matrix_b, i), depth, scales, out + first * stride, stride);
    }
  }
}

// Address of number i of row n.
const char* RowReader::at(size_t n, size_t i) const {
  return static_cast<const char*>(rows_.values) +
         (static_cast<ptrdiff_t>(n) * rows_.stride + static_cast<ptrdiff_t>(i)) *
             static_cast<ptrdiff_t>(bytes_);
}

// Address of what is read kAheadBytes after number i of row n: there, or a tile further.
const char* RowReader::ahead(size_t n, size_t i) const {
  const size_t later = i + kAheadBytes / bytes_, whole = rows_.L * rows_.d;
  return later < whole ? at(n, later)
                       : at(std::min(n + tile_rows_, rows_.N - 1), std::min(later - whole, whole));
}

float RowReader::scale(size_t n, size_t b) const {
  return rows_.scales ? rows_.scales[n * rows_.L + b] : 1.0f;
}

// `depth` numbers as floats: the store's own, or row r of wide_.
const float* RowReader::single(const char* stored, size_t depth, int r) {
  if (wide_.empty()) return reinterpret_cast<const float*>(stored);
  float* wide = wide_.data() + r * kDepth;
  type_.widen(stored, depth, wide);
  return wide;
}

}  // namespace trackstar
