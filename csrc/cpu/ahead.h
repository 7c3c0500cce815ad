// Fetching the rows that are scored next while others are worked on.
#pragma once

#include <algorithm>
#include <cstddef>

#include "cpu/coded.h"
#include "cpu/fetch_lines.h"
#include "cpu/isa.h"
#include "scoring.h"

namespace trackstar {

// Whether rows are fetched from several pages at a time. On Ice Lake one query on float32 rows takes 0.73 of the time then,
// eight take 0.85; other makers' processors have not been tried.
inline bool is_woven(const Rows& rows) { return is_dense(rows) && is_intel(); }

// Lines of the next rows in order, as memory likes it: of all of them in one piece, or row by row where they lie far
// apart.
class Ahead {
 public:
  // Goes to rows row … row + count - 1, of which those past the end do not count.
  void open(const Rows& rows, size_t row, size_t count) {
    count = row < rows.N ? std::min(count, rows.N - row) : 0;
    const size_t row_bytes = rows.L * block_bytes(rows.type, rows.d);
    at_ = row_at(rows, row);
    stride_ = row_at(rows, row + 1) - at_;
    const bool dense = is_dense(rows);
    woven_ = is_woven(rows);
    pieces_ = dense ? std::min<size_t>(count, 1) : count;
    piece_lines_ = (dense ? count * static_cast<size_t>(stride_) : row_bytes) / kLineBytes;
    taken_ = 0;
    lines_ = pieces_ * piece_lines_;
  }

  // How many there were at first, for each of so many calls.
  size_t share(size_t calls) const { return (lines_ + calls - 1) / calls; }

  // The next lines, at most as many.
  FetchLines take(size_t lines) {
    if (pieces_ == 0) return {nullptr, 0, woven_};
    const FetchLines fetch{at_ + taken_ * kLineBytes, std::min(lines, piece_lines_ - taken_), woven_};
    taken_ += fetch.lines;
    if (taken_ == piece_lines_) {
      at_ += stride_;
      taken_ = 0;
      --pieces_;
    }
    return fetch;
  }

 private:
  const uint8_t* at_ = nullptr;
  ptrdiff_t stride_ = 0;
  size_t pieces_ = 0, piece_lines_ = 0, taken_ = 0;  // taken of the first that is left
  size_t lines_ = 0;
  bool woven_ = false;
};

}  // namespace trackstar
