// Exact top-k over stored rows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trackstar {

enum class RowType { float32, float16 };

// N rows of L blocks of d numbers; no size is zero.
struct Rows {
  const void* values;  // each row dense
  RowType type;
  ptrdiff_t stride;     // numbers between rows
  const float* scales;  // null, or (N, L), dense: multipliers of each row's blocks
  size_t N, L, d;
};

// The k best rows for each of Q queries, 1 ≤ k ≤ N: scores (Q, k) and positions (Q, k), best first. Equal
// scores go to the smaller position; a NaN comes after every number.
struct TopK {
  size_t Q, k;
  bool largest;  // false: the smallest scores are best
  float* scores;
  int64_t* positions;
};

// score(q, n) = Σ_b scales[n, b] · Σ_j queries[q, b, j] · rows[n, b, j]          queries (Q, L, d), dense
//
// Every score is accumulated in float32, in an order that depends on d and on whether Q ≤ 4 alone: chunks
// that never cross a block, each summed from zero, then scaled and added one after another. With more than
// four queries a chunk is 256 numbers summed in order; with up to four it is 256 vectors, whose lanes are
// added last. So within each of the two cases a score has the same bits whatever the other queries and rows,
// their number, and `threads`.
void score_topk(const float* queries, const Rows& rows, const TopK& top, int threads);

// Cosines under another inner product. With y a row and t_b = factors_b · y_b of length r,
//
//     score(q, n) = Σ_b combine_q,b · t_b / √norm, and 0 where the squared norms are 0
//     norm        = base · Σ_b squared_norms[n, b] + sign · Σ_b ‖t_b‖²
//
// with factors (L, r, d), combine (Q, L, r) and squared_norms (N, L).
//
// A row whose norm is less than `trusted` of its squared norms has lost it to rounding: it is left out of the
// result and marked in doubtful (N). Only the first min(k, rows not marked) results of each query are filled.
// Accumulated in float32, norms over blocks in float64; the order depends on r, d and whether r ≤ 4 alone.
struct Mixing {
  const float* factors;
  const float* combine;
  const float* squared_norms;
  size_t rank;
  double base, sign, trusted;
  bool* doubtful;
};
void mixed_topk(const Mixing& mixing, const Rows& rows, const TopK& top, int threads);

}  // namespace trackstar
