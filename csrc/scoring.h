// Exact top-k over stored rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace trackstar {

enum class RowType { float32, float16, bfloat16, int8, int4, sign };

// N rows of L blocks of d numbers; no size is zero, and N < 2³². Blocks of int4 take ⌈d/64⌉ + ⌈d/2⌉ bytes, of
// sign ⌈d/32⌉ words of 32 bits: see trackstar_kernels/encode/README.md.
struct Rows {
  const void* values;  // each row dense
  RowType type;
  ptrdiff_t stride;     // numbers, bytes or words between rows
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
  // Null, or (Q) scores that k other rows have, NaN where that is not known: what is worse may be left out, and places
  // for which nothing is found get a NaN and position -1.
  const float* reached = nullptr;
};

// The k best rows of one scan for each of some queries: scores (Q, k) and positions (Q, k).
struct Found {
  const float* scores;
  const int64_t* positions;
  size_t k;
};

// The best of what several scans of other rows found for the same queries, at least top.k in all.
void merge_topk(const std::vector<Found>& parts, const TopK& top);

// score(q, n) = Σ_b scales[n, b] · Σ_j queries[q, b, j] · rows[n, b, j]          queries (Q, L, d), dense
//
// One scan fills one result or several, such as the largest and the smallest scores; their Q are equal.
//
// Every score is accumulated in float32, in an order that depends on d, on the processor, and on whether Q is 1, at most 4,
// at most 8 or more: chunks that never cross a block, each summed from zero, then scaled and added one after another. With
// more than eight queries a chunk is 256 numbers, of which those at even and at odd places are summed in order and then
// added (on vectors of four floats: all of them in order); with fewer it is 256 vectors, whose lanes are added last, in
// pairs; with one, its vectors are added to four sums in turn. On float32 rows and in vectors of sixteen floats Intel's
// processors do the first with more than four queries, Zen 5 with more than one. So within each of the four cases a score
// has the same bits whatever the other queries and rows, their number, and `threads`. Many queries take float rows rounded to bytes first, and compute only those
// scores that may be among the best, as long as those are few. Scores with int8, int4 and sign rows always have the
// bits of a single query.
void score_topk(const float* queries, const Rows& rows, const std::vector<TopK>& tops, int threads);

// Queries (Q, L, d), dense, in the layouts of the kernels: made once, for any number of scans of rows of one type that
// is not narrow.
class Queries {
 public:
  Queries(const float* values, size_t Q, size_t L, size_t d, RowType type);
  ~Queries();

 private:
  friend void score_topk(const Queries&, const Rows&, const std::vector<TopK>&, int);
  friend void score_topk(const float*, const Rows&, const std::vector<TopK>&, int);
  struct Layout;
  std::unique_ptr<Layout> layout_;
};

// score_topk of rows of the queries' type, with the same bits.
void score_topk(const Queries& queries, const Rows& rows, const std::vector<TopK>& tops, int threads);

// score_topk of the float32 or float16 rows `wider`, found through their narrow codes, which encode_rows made of
// rows with these squared_norms (N, L), dense. Scores have the bits that they have for a single query. The number
// of wider rows that were looked at goes to rescored (tops, Q).
void rescored_topk(const float* queries, const Rows& codes, const Rows& wider, const float* squared_norms,
                   const std::vector<TopK>& tops, int64_t* rescored, int threads);

// What a task's scores with narrow rows are made of, see Task: weights_q · Σ_b combine_q,b · t_b (N, Q), the rows'
// squares Σ_b ‖y_b‖² (N), and base · square + sign · Σ_b ‖t_b‖² (N).
struct MixedParts {
  float* numerators;
  double* squares;
  double* inner;
};

// Queries and another inner product, in the layout of the kernels: made once, for any number of scans.
//
// With y a row and t_b = factors_b · y_b of length rank,
//
//     score(q, n) = weights_q · Σ_b combine_q,b · t_b / √norm, and 0 where the squared norms are 0
//     norm        = base · Σ_b squared_norms[n, b] + sign · Σ_b ‖t_b‖²
class Task {
 public:
  struct Shape {
    size_t Q, L, d, rank;
    double base, sign;
    double trusted;  // see mixed_topk
  };

  explicit Task(const Shape& shape);
  ~Task();

  // Copies factors (rank, d) and combine (Q, rank) of block b, dense. To be called once for each block.
  void set_block(size_t b, const float* factors, const float* combine);
  // Copies weights (Q).
  void set_weights(const float* weights);

 private:
  friend void mixed_topk(const Task&, const float*, const Rows&, const std::vector<TopK>&, bool*, int);
  friend void mixed_parts(const Task&, const Rows&, const MixedParts&, int);
  struct Layout;
  std::unique_ptr<Layout> layout_;
};

// The best rows under a task, whose Q, L and d are those of `tops` and `rows`; squared_norms (N, L), dense. What they
// exceed those of int8, int4 and sign rows by counts in the norm, whatever `base`: what narrowing took from a row is
// taken to be orthogonal to the queries.
//
// A row whose norm is less than `trusted` of its squared norms has lost it to rounding: it is left out of the
// result and marked in doubtful (N). Only the first min(k, rows not marked) results of each query are filled.
// Accumulated in float32, norms over blocks in float64; the order depends on rank, d and whether rank ≤ 8 alone.
void mixed_topk(const Task& task, const float* squared_norms, const Rows& rows, const std::vector<TopK>& tops,
                bool* doubtful, int threads);

// Those of narrow rows.
void mixed_parts(const Task& task, const Rows& rows, const MixedParts& parts, int threads);

}  // namespace trackstar
