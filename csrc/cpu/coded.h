// Narrow rows: where their codes are, and finding the best of them.
#pragma once

#include <vector>

#include "cpu/code_layout.h"
#include "cpu/coded_kernel.h"
#include "scoring.h"

namespace trackstar {

inline bool is_coded(RowType type) {
  return type == RowType::int8 || type == RowType::int4 || type == RowType::sign;
}

// Bytes of d elements from the start of a block, with what is left of their last number.
inline size_t block_bytes(RowType type, size_t d) {
  switch (type) {
    case RowType::float32:
      return 4 * d;
    case RowType::float16:
    case RowType::bfloat16:
      return 2 * d;
    case RowType::int8:
      return d;
    case RowType::int4:
      return int4_bytes(d);
    default:
      return (d + 31) / 32 * 4;
  }
}

inline const uint8_t* row_at(const Rows& rows, size_t n) {
  const bool byte = rows.type == RowType::int8 || rows.type == RowType::int4;
  const bool two = rows.type == RowType::float16 || rows.type == RowType::bfloat16;
  const ptrdiff_t unit = byte ? 1 : two ? 2 : 4;
  return static_cast<const uint8_t*>(rows.values) + static_cast<ptrdiff_t>(n) * rows.stride * unit;
}

// Whether rows follow one another so closely that what lies between them may be read as well.
inline bool is_dense(const Rows& rows) {
  const ptrdiff_t stride = row_at(rows, 1) - row_at(rows, 0);
  const size_t row_bytes = rows.L * block_bytes(rows.type, rows.d);
  return stride >= 0 && static_cast<size_t>(stride) <= row_bytes + row_bytes / 8;
}

// The kernels of the level in force.
const CodedKernels& coded_kernels();
const CodeKernels& code_kernels(RowType type);

// ‖scale · code‖² of narrow row n, or a little less if it has codes of -128.
double decoded_square(const Rows& rows, size_t n);

// score_topk of narrow rows.
void coded_topk(const float* queries, const Rows& codes, const std::vector<TopK>& tops, int threads);

}  // namespace trackstar
