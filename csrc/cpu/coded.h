// Narrow rows: where their codes are, and finding the best of them.
#pragma once

#include "cpu/coded_kernel.h"
#include "scoring.h"

namespace trackstar {

inline bool is_coded(RowType type) { return type != RowType::float32 && type != RowType::float16; }

// Bytes of d elements from the start of a block, with what is left of their last number.
inline size_t block_bytes(RowType type, size_t d) {
  switch (type) {
    case RowType::float32:
      return 4 * d;
    case RowType::float16:
      return 2 * d;
    case RowType::int8:
      return d;
    case RowType::int4:
      return (d + 1) / 2;
    default:
      return (d + 31) / 32 * 4;
  }
}

inline const uint8_t* row_at(const Rows& rows, size_t n) {
  const ptrdiff_t unit = rows.type == RowType::float32 || rows.type == RowType::sign ? 4
                         : rows.type == RowType::float16                             ? 2
                                                                                     : 1;
  return static_cast<const uint8_t*>(rows.values) + static_cast<ptrdiff_t>(n) * rows.stride * unit;
}

// The kernels of the level in force.
const CodedKernels& coded_kernels();
const CodeKernels& code_kernels(RowType type);

// score_topk of narrow rows.
void coded_topk(const float* queries, const Rows& codes, const TopK& top, int threads);

}  // namespace trackstar
