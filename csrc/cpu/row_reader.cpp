#include "cpu/row_reader.h"

#include <algorithm>

namespace trackstar {
namespace {

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
      tile_(tile_rows + kMaxBlockRows),
      next_tile_(tile_rows + kMaxBlockRows),
      wide_(rows.type == RowType::float32 ? 0 : kMaxBlockRows * kDepth) {}

void RowReader::open(size_t row, size_t count) {
  row_ = row;
  count_ = count;
  for (size_t r = 0; r < tile_.size(); ++r) {
    const size_t n = row + std::min(r, count - 1);
    tile_[r] = at(n);
    next_tile_[r] = at(std::min(n + tile_rows_, rows_.N - 1));
  }
}

void RowReader::multiply(size_t b, const Matrix& matrix, size_t matrix_b, size_t begin, size_t end,
                         float* out, size_t stride) {
  if (matrix.panels().empty()) {
    multiply_few(b, matrix, matrix_b, out, stride);
    return;
  }
  const size_t block_rows = matrix.block_rows(), row_bytes = rows_.L * rows_.d * bytes_;
  const bool widen = !wide_.empty();
  for (size_t i = 0; i < rows_.d; i += kDepth) {
    const size_t depth = std::min(kDepth, rows_.d - i);
    // What is read kAheadBytes later lies in the same row, or a tile further.
    const size_t offset = (b * rows_.d + i) * bytes_, later = offset + kAheadBytes;
    const char* const* const ahead_rows = later < row_bytes ? tile_.data() : next_tile_.data();
    const size_t ahead_offset = later < row_bytes ? later : std::min(later - row_bytes, row_bytes);
    for (size_t first = 0; first < count_; first += block_rows) {
      const float* rows[kMaxBlockRows];
      const char* ahead[kMaxBlockRows];
      float scale[kMaxBlockRows];
      for (size_t r = 0; r < block_rows; ++r) {
        rows[r] = reinterpret_cast<const float*>(tile_[first + r] + offset);
        ahead[r] = ahead_rows[first + r] + ahead_offset;
      }
      scales(b, first, block_rows, scale);
      if (widen) {
        for (size_t r = 0; r < block_rows; ++r) {
          float* wide = wide_.data() + r * kDepth;
          type_.widen(rows[r], depth, wide);
          rows[r] = wide;
        }
      }
      // The first panel fetches for all.
      Fetch fetch{ahead, kLineBytes / bytes_};
      for (size_t p = begin; p < end; ++p, fetch = {nullptr, 0}) {
        const Matrix::Panel& panel = matrix.panels()[p];
        panel.kernel->run(rows, matrix.panel_at(panel, matrix_b, i), depth, fetch, scale,
                          out + first * stride + panel.first, stride);
      }
    }
  }
}

void RowReader::multiply_few(size_t b, const Matrix& matrix, size_t matrix_b, float* out,
                             size_t stride) const {
  const DotKernel& kernel = type_.dot[matrix.count() - 1];
  const size_t block_rows = kernel.rows, max_depth = kDepth * kernels_.lanes;
  const size_t row_bytes = rows_.L * rows_.d * bytes_;
  for (size_t first = 0; first < count_; first += block_rows) {
    for (size_t i = 0; i < rows_.d; i += max_depth) {
      const size_t depth = std::min(max_depth, rows_.d - i);
      const size_t offset = (b * rows_.d + i) * bytes_, end = offset + depth * bytes_;
      // What a short call reads was fetched by the one before; it fetches for the one after the next.
      const size_t later = depth * bytes_ > kAheadBytes ? end : end + kAheadBytes;
      const char* const* const next_rows = later < row_bytes ? tile_.data() : next_tile_.data();
      const size_t next_offset = later < row_bytes ? later : later - row_bytes;
      const void *rows[kMaxBlockRows], *next[kMaxBlockRows];
      float scale[kMaxBlockRows];
      for (size_t r = 0; r < block_rows; ++r) {
        rows[r] = tile_[first + r] + offset;
        next[r] = next_rows[first + r] + next_offset;
      }
      scales(b, first, block_rows, scale);
      kernel.run(rows, next, matrix.interleaved_at(matrix_b, i), depth, scale, out + first * stride, stride);
    }
  }
}

// Where row n begins.
const char* RowReader::at(size_t n) const {
  return static_cast<const char*>(rows_.values) +
         static_cast<ptrdiff_t>(n) * rows_.stride * static_cast<ptrdiff_t>(bytes_);
}

// Those of block b of a block of the tile's rows.
void RowReader::scales(size_t b, size_t first, size_t block_rows, float* out) const {
  for (size_t r = 0; r < block_rows; ++r) {
    out[r] = rows_.scales ? rows_.scales[(row_ + std::min(first + r, count_ - 1)) * rows_.L + b] : 1.0f;
  }
}

}  // namespace trackstar
