// Exact top-k of inner products.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trackstar {

enum class RowType { float32, float16 };

// For each of Q queries, the k rows with the largest score
//
//     score(q, n) = Σ_b scales[n, b] · Σ_j queries[q, b, j] · rows[n, b, j]
//
// queries  (Q, L, d) float32, dense.
// rows     (N, L, d) of `row_type`; each row dense, `row_stride` elements between rows.
// scales   null, or (N, L) float32, dense.
// largest  false asks for the k smallest scores instead.
//
// scores (Q, k) float32 and positions (Q, k) int64 are filled best first. Equal scores go to the smaller
// position; a NaN comes after every number. 1 ≤ k ≤ N; no size is zero.
//
// Every score is accumulated in float32, in an order that depends on d and on whether Q ≤ 4 alone: chunks
// that never cross a block, each summed from zero, then scaled and added one after another. With more than
// four queries a chunk is 256 numbers summed in order; with up to four it is 256 vectors, whose lanes are
// added last. So within each of the two cases a score has the same bits whatever the other queries and rows,
// their number, and `threads`.
void score_topk(const float* queries, const void* rows, RowType row_type, ptrdiff_t row_stride,
                const float* scales, size_t Q, size_t N, size_t L, size_t d, size_t k, bool largest,
                int threads, float* scores, int64_t* positions);

}  // namespace trackstar
