// Exact top-k on NVIDIA GPUs, sm_80 and later, up to the last merge, which is the caller's.
//
// Pointers are to device memory. No size is zero. Calls return as soon as the work is queued on `stream`, a
// cudaStream_t, and throw std::runtime_error if it could not be.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trackstar::cuda {

enum class RowType { float32, float16, bfloat16, int8 };

// N rows of L blocks of d numbers, N < 2³² - 1.
struct Rows {
  const void* values;  // each row dense
  RowType type;
  ptrdiff_t stride;     // numbers between rows
  const float* scales;  // null, or (N, L), dense: multipliers of each row's blocks
  size_t N;
  int L, d;
};

// A matrix as the tensor cores take it: `columns` vectors at a time (16 or 64, all of a call alike), in steps of
// kDepth numbers that never cross a block, each number split into narrow ones ("planes") whose sum it is. The
// dense layout is (vectors / columns, blocks, steps, planes, columns, 128 bytes); trackstar_kernels/scoring/
// _operands.py writes it.
using Operand = const void*;

// Where survivors go: for each query and slice of the rows the keys of its k best, and of others, among `capacity`
// places, the rest filled with kEmpty. A slice is what one thread block scans: every slices-th tile of rows.
// A larger key is a better result, and no two are equal. In the upper half are the bits of the score, negated
// where the smallest are best, in an order of integers with NaN below all; in the lower half the complement of
// the row's position.
struct Survivors {
  int64_t* keys;  // (Q, slices, capacity)
  int Q, k, slices, capacity;
  bool largest;
};

constexpr int kTileRows = 128;
constexpr int64_t kEmpty = INT64_MIN;

// A slice holds its k best and one tile of others, or all that it is offered.
constexpr bool fits(const Survivors& s, size_t N) {
  size_t tiles = (N + kTileRows - 1) / kTileRows, offered = (tiles + s.slices - 1) / s.slices * kTileRows;
  return static_cast<size_t>(s.slices) <= tiles &&
         (s.capacity >= s.k + kTileRows || static_cast<size_t>(s.capacity) >= offered);
}

// score(q, n) = Σ_b scales[n, b] · Σ_j queries[q, b, j] · rows[n, b, j]
//
// `operand` holds queries[q] / query_scales[q]; a score that comes out as NaN is computed again from `queries`
// (Q, L, d), as infinite numbers, split in planes, are NaN. Sums of a step are added, times the scale, in float32
// from the first step to the last: a score has the same bits whatever the other queries and rows.
void score_topk(const Rows& rows, const float* queries, Operand operand, const float* query_scales,
                int columns, const Survivors& survivors, void* stream);

// The scores of mixed_topk in csrc/scoring.h, with its base, sign and trusted:
//
//     t_b = factor_scales_b · factors_b · y_b     score(q, n) = Σ_b combine_q,b · t_b / √norm
//     norm = base · Σ_b squared_norms[n, b] + sign · Σ_b ‖t_b‖²
//
// with factors (rank, L, d) an operand for the rows' type and combine (Q, L · parts, columns) one for float32 rows,
// where rank is padded to parts · columns, and of every 8 numbers of combine those with even index come first.
// Rows that have lost their norm to rounding are marked in doubtful (N) and are no survivors.
struct Mixing {
  Operand factors, combine;
  const float* factor_scales;  // (L)
  const float* squared_norms;  // (N, L)
  int rank;
  double base, sign, trusted;
  bool* doubtful;
};
void mixed_topk(const Rows& rows, const Mixing& mixing, int columns, const Survivors& survivors,
                void* stream);

}  // namespace trackstar::cuda
