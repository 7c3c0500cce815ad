#include "cpu/row_reader.h"

#include <algorithm>

namespace trackstar {
RowReader::RowReader(const Rows& rows, size_t tile_rows)
    : rows_(rows),
      kernels_(scoring_kernels()),
      type_(row_kernels(rows.type)),
      codes_(is_coded(rows.type) ? &code_kernels(rows.type) : nullptr),
      block_bytes_(block_bytes(rows.type, rows.d)),
      tile_rows_(tile_rows),
      tile_(tile_rows + kMaxBlockRows),
      wide_(rows.type == RowType::float32
                ? 0
                : kMaxBlockRows * (codes_ ? kChunkDepth * kernels_.lanes : kChunkDepth)),
      ones_(rows.scales ? 0 : rows.L, 1.0f) {}

void RowReader::open(size_t row, size_t count) {
  row_ = row;
  count_ = count;
  for (size_t r = 0; r < tile_.size(); ++r) {
    tile_[r] = at(row + std::min(r, count - 1));
  }
  ahead_.open(rows_, row + count, tile_rows_);
}

void RowReader::multiply(const Matrix& matrix, size_t begin, size_t end, float* out, size_t stride) {
  if (matrix.panels().empty()) {
    multiply_few(0, rows_.L, matrix, 0, out, stride);
  } else {
    for (size_t b = 0; b < rows_.L; ++b) multiply(b, matrix, b, begin, end, out, stride);
  }
}

void RowReader::multiply(size_t b, const Matrix& matrix, size_t matrix_b, size_t begin, size_t end,
                         float* out, size_t stride) {
  if (matrix.panels().empty()) {
    multiply_few(b, 1, matrix, matrix_b, out, stride);
    return;
  }
  const size_t block_rows = matrix.block_rows();
  const bool widen = !wide_.empty();
  // The next tile is fetched meanwhile, a part with every call.
  const size_t calls = rows_.L * ((rows_.d + kChunkDepth - 1) / kChunkDepth) * (end - begin) *
                       ((count_ + block_rows - 1) / block_rows);
  // Rows that are read side by side lie in as many pages as would be fetched from in turn: that is quick enough, and fetching
  // as well took 1.15 of the time (eight queries on float32 rows, Ice Lake).
  const size_t lines = !widen && is_woven(rows_) ? 0 : ahead_.share(calls);
  for (size_t i = 0; i < rows_.d; i += kChunkDepth) {
    const size_t depth = std::min(kChunkDepth, rows_.d - i);
    const size_t offset = b * block_bytes_ + block_bytes(rows_.type, i);
    for (size_t first = 0; first < count_; first += block_rows) {
      const float* rows[kMaxBlockRows];
      float scale[kMaxBlockRows];
      for (size_t r = 0; r < block_rows; ++r) {
        rows[r] = reinterpret_cast<const float*>(tile_[first + r] + offset);
      }
      scales(b, first, block_rows, scale);
      if (widen) {
        for (size_t r = 0; r < block_rows; ++r) {
          float* wide = wide_.data() + r * kChunkDepth;
          widen_row(rows[r], depth, wide);
          rows[r] = wide;
        }
      }
      for (size_t p = begin; p < end; ++p) {
        const Matrix::Panel& panel = matrix.panels()[p];
        panel.kernel->run(rows, matrix.panel_at(panel, matrix_b, i), depth, ahead_.take(lines), scale,
                          out + first * stride + panel.first, stride);
      }
    }
  }
}

void RowReader::multiply_few(size_t b, size_t count, const Matrix& matrix, size_t matrix_b, float* out,
                             size_t stride) {
  // Codes of several blocks are not floats side by side.
  const size_t max_depth = kChunkDepth * kernels_.lanes;
  if (count > 1 && (codes_ || rows_.d > max_depth)) {
    for (size_t i = 0; i < count; ++i) multiply_few(b + i, 1, matrix, matrix_b + i, out, stride);
    return;
  }
  const DotKernel& kernel = type_.dot[matrix.count() - 1];
  const size_t block_rows = kernel.rows;
  const size_t calls =
      rows_.L / count * ((rows_.d + max_depth - 1) / max_depth) * ((count_ + block_rows - 1) / block_rows);
  const size_t lines = ahead_.share(calls);
  for (size_t first = 0; first < count_; first += block_rows) {
    for (size_t i = 0; i < rows_.d; i += max_depth) {
      const size_t depth = std::min(max_depth, rows_.d - i);
      const size_t offset = b * block_bytes_ + block_bytes(rows_.type, i);
      const void* rows[kMaxBlockRows];
      const float* scales[kMaxBlockRows];
      for (size_t r = 0; r < block_rows; ++r) {
        rows[r] = tile_[first + r] + offset;
        scales[r] = rows_.scales ? rows_.scales + (row_ + std::min(first + r, count_ - 1)) * rows_.L + b
                                 : ones_.data();
        if (codes_) {
          float* wide = wide_.data() + r * kChunkDepth * kernels_.lanes;
          widen_row(rows[r], depth, wide);
          rows[r] = wide;
        }
      }
      FetchLines fetch = ahead_.take(lines);
      if (codes_ && matrix.count() == 1) {
        // That kernel fetches what lies behind a row, and this one's floats are in cache.
        for (; fetch.lines > 0; --fetch.lines, fetch.from += kLineBytes) __builtin_prefetch(fetch.from, 0, 2);
      }
      kernel.run(rows, fetch, matrix.interleaved_at(matrix_b, i), {count, depth, rows_.d}, scales,
                 out + first * stride, stride);
    }
  }
}

// n numbers of a block as floats, not scaled.
void RowReader::widen_row(const void* stored, size_t n, float* out) const {
  if (codes_) {
    codes_->widen(static_cast<const uint8_t*>(stored), n, out);
  } else {
    type_.widen(stored, n, out);
  }
}

// Those of block b of a block of the tile's rows.
void RowReader::scales(size_t b, size_t first, size_t block_rows, float* out) const {
  for (size_t r = 0; r < block_rows; ++r) {
    out[r] = rows_.scales ? rows_.scales[(row_ + std::min(first + r, count_ - 1)) * rows_.L + b] : 1.0f;
  }
}

}  // namespace trackstar
