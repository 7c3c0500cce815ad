#include "cpu/row_reader.h"

#include <algorithm>

namespace trackstar {
namespace {

constexpr size_t kLineBytes = 64;

const RowKernels& row_kernels(RowType type) {
  const ScoringKernels& kernels = scoring_kernels();
  return type == RowType::float16    ? kernels.half
         : type == RowType::bfloat16 ? kernels.bfloat16
                                     : kernels.single;  // narrow rows are widened first
}

}  // namespace

RowReader::RowReader(const Rows& rows, size_t tile_rows)
    : rows_(rows),
      kernels_(scoring_kernels()),
      type_(row_kernels(rows.type)),
      codes_(is_coded(rows.type) ? &code_kernels(rows.type) : nullptr),
      block_bytes_(block_bytes(rows.type, rows.d)),
      tile_rows_(tile_rows),
      tile_(tile_rows + kMaxBlockRows),
      next_tile_(tile_rows + kMaxBlockRows),
      wide_(rows.type == RowType::float32 ? 0 : kMaxBlockRows * (codes_ ? kChunkDepth * kernels_.lanes : kChunkDepth)) {
}

void RowReader::open(size_t row, size_t count) {
  row_ = row;
  count_ = count;
  for (size_t r = 0; r < tile_.size(); ++r) {
    const size_t n = row + std::min(r, count - 1);
    tile_[r] = at(n);
    next_tile_[r] = at(std::min(n + tile_rows_, rows_.N - 1));
  }
  const size_t end = row + count;
  ahead_.open(rows_, end, std::min(tile_rows_, rows_.N - end));
}

void RowReader::Ahead::open(const Rows& rows, size_t row, size_t count) {
  const size_t row_bytes = rows.L * block_bytes(rows.type, rows.d);
  at_ = reinterpret_cast<const char*>(row_at(rows, row));
  stride_ = reinterpret_cast<const char*>(row_at(rows, row + 1)) - at_;
  const bool dense = stride_ >= 0 && static_cast<size_t>(stride_) <= row_bytes + row_bytes / 8;
  pieces_ = dense ? std::min<size_t>(count, 1) : count;
  piece_lines_ = (dense ? count * static_cast<size_t>(stride_) : row_bytes) / kLineBytes;
  taken_ = 0;
  lines_ = pieces_ * piece_lines_;
}

Fetch RowReader::Ahead::take(size_t lines) {
  if (pieces_ == 0) return {at_, 0};
  const Fetch fetch{at_ + taken_ * kLineBytes, std::min(lines, piece_lines_ - taken_)};
  taken_ += fetch.lines;
  if (taken_ == piece_lines_) {
    at_ += stride_;
    taken_ = 0;
    --pieces_;
  }
  return fetch;
}

void RowReader::multiply(size_t b, const Matrix& matrix, size_t matrix_b, size_t begin, size_t end,
                         float* out, size_t stride) {
  if (matrix.panels().empty()) {
    multiply_few(b, matrix, matrix_b, out, stride);
    return;
  }
  const size_t block_rows = matrix.block_rows();
  const bool widen = !wide_.empty();
  // The next tile is fetched meanwhile, a part with every call.
  const size_t calls = rows_.L * ((rows_.d + kChunkDepth - 1) / kChunkDepth) * (end - begin) *
                       ((count_ + block_rows - 1) / block_rows);
  const size_t lines = (ahead_.lines() + calls - 1) / calls;
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

void RowReader::multiply_few(size_t b, const Matrix& matrix, size_t matrix_b, float* out, size_t stride) {
  const size_t max_depth = kChunkDepth * kernels_.lanes;
  const bool by_itself =
      matrix.count() == 1 && !codes_ && block_bytes(rows_.type, std::min(rows_.d, max_depth)) >= kLongBytes;
  const DotKernel& kernel = by_itself ? type_.long_dot : type_.dot[matrix.count() - 1];
  const size_t block_rows = kernel.rows;
  const size_t row_bytes = rows_.L * block_bytes_;
  for (size_t first = 0; first < count_; first += block_rows) {
    for (size_t i = 0; i < rows_.d; i += max_depth) {
      const size_t depth = std::min(max_depth, rows_.d - i);
      const size_t offset = b * block_bytes_ + block_bytes(rows_.type, i);
      const size_t bytes = block_bytes(rows_.type, depth), end = offset + bytes;
      // What a short call reads was fetched by the one before; it fetches for the one after the next.
      const size_t later = bytes > kAheadBytes ? end : end + kAheadBytes;
      const char* const* const next_rows = later < row_bytes ? tile_.data() : next_tile_.data();
      const size_t next_offset = later < row_bytes ? later : later - row_bytes;
      const void *rows[kMaxBlockRows], *next[kMaxBlockRows];
      float scale[kMaxBlockRows];
      for (size_t r = 0; r < block_rows; ++r) {
        rows[r] = tile_[first + r] + offset;
        next[r] = next_rows[first + r] + next_offset;
        if (codes_) {
          float* wide = wide_.data() + r * kChunkDepth * kernels_.lanes;
          widen_row(rows[r], depth, wide);
          rows[r] = next[r] = wide;
        }
      }
      scales(b, first, block_rows, scale);
      kernel.run(rows, next, matrix.interleaved_at(matrix_b, i), depth, scale, out + first * stride, stride);
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
