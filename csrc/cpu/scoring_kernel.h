// Micro-kernels of scoring, one table per instruction set (csrc/cpu/isa.h).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/narrow.h"

namespace trackstar {

// Both kinds add, for a block of rows and all their queries,
//
//     scores[r * score_stride + q] += scale[r] · Σ_k rows[r][k] · query_q[k]      k < depth
//
// with a sum over k that starts from zero in every call and is always taken in the same order. Meanwhile they
// fetch into cache what will be read later: rows lie too far apart for the hardware to see that coming.

// Few queries, rows as they are stored. Queries are interleaved by vectors of `lanes` numbers: the first vector
// of each, the second of each, …, and what is left of each. A call fetches what it reads kAheadBytes later, but for
// its last kAheadBytes, or all that it reads if that is less: for those as much from next[r].
struct DotKernel {
  int rows;
  void (*run)(const void* const* rows, const void* const* next, const float* queries, size_t depth,
              const float* scale, float* scores, size_t score_stride);
};

// Lines to fetch, one after another, while a kernel works. Into the second-level cache: there is more than the first
// holds until they are read.
struct Fetch {
  const char* from;
  size_t lines;
};

// Many queries: panel[k / group][query][k % group], zeros where k ≥ depth.
struct PanelKernel {
  int rows;
  int queries;
  void (*run)(const float* const* rows, const float* panel, size_t depth, const Fetch& fetch,
              const float* scale, float* scores, size_t score_stride);
};

constexpr size_t kLongBytes = 4096;   // of a row, from which on one query reads it by itself
constexpr size_t kAheadBytes = 1024;  // how long before a row is read its lines are fetched
constexpr int kMaxDotQueries = 4;
constexpr int kMaxBlockRows = 12;

constexpr size_t kChunkDepth = 256;  // numbers that are summed one after another: see scoring.h

// What rows of one type need.
struct RowKernels {
  DotKernel dot[kMaxDotQueries];  // 1 to 4 queries
  // Of one query, a row at a time, with the bits of dot[0]: fetches the row's pages and does not look at `next`. With
  // more queries these, and not memory, would be waited for.
  DotKernel long_dot;
  void (*widen)(const void* in, size_t n, float* out);  // to what a panel kernel takes
};

struct ScoringKernels {
  int lanes;  // of a vector
  int group;  // numbers of depth side by side in a panel
  RowKernels single, half, bfloat16;
  PanelKernel narrow, wide;  // panels one and two vectors wide

  // Σ_b scales[b] · Σ_k row[b][k] · query_b[k] of one row (L, d) and one query, with the bits that PanelKernel gives
  // them. Chunks of kChunkDepth numbers lie side by side in the query, lanes / group of them, those of all blocks one
  // after another and zeros where there is none: [k / group][chunk][k % group], depths padded with zeros to whole
  // vectors. Behind them in the same way what is left of each block. `sums` has room for one of every chunk.
  float (*score_row)(const float* row, const float* query, size_t L, size_t d, const float* scales, float* sums);

  float (*sum_of_squares)(const float* in, size_t n);

  // Which of n scores are neither at most `above` nor at least `below`, each its own: NaNs and those beyond a
  // bound. Their indices are written to `which`, in order; returns how many.
  size_t (*outside)(const float* scores, const float* above, const float* below, size_t n, uint32_t* which);
};

// Those of the level in force.
const ScoringKernels& scoring_kernels();

namespace baseline {
extern const ScoringKernels scoring_kernels;
}
namespace v3 {
extern const ScoringKernels scoring_kernels;
}
namespace v4 {
extern const ScoringKernels scoring_kernels;
}

}  // namespace trackstar
