// Micro-kernels of scoring, one table per instruction set (csrc/cpu/isa.h).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/fetch_lines.h"
#include "cpu/narrow.h"

namespace trackstar {

enum class RowType;

// Both kinds add, for a block of rows and all their queries,
//
//     scores[r * score_stride + q] += scale[r] · Σ_k rows[r][k] · query_q[k]      k < depth
//
// with a sum over k that starts from zero in every call and is always taken in the same order. Meanwhile they fetch
// what will be read later.

// So many blocks of `depth` numbers, `stride` from one to the next.
struct Blocks {
  size_t count, depth, stride;
};

// Few queries, rows as they are stored, one or several of their blocks with a scale each. Queries are interleaved by
// vectors of `lanes` numbers of a block: the first vector of each, the second of each, …, and what is left of each. With
// one query, where there is something to fetch it is taken to lie behind the row.
struct DotKernel {
  int rows;
  void (*run)(const void* const* rows, const FetchLines& fetch, const float* queries, const Blocks& blocks,
              const float* const* scales, float* scores, size_t score_stride);
};

// Many queries: panel[k / group][query][k % group], zeros where k ≥ depth.
struct PanelKernel {
  int rows;
  int queries;
  void (*run)(const float* const* rows, const float* panel, size_t depth, const FetchLines& fetch,
              const float* scale, float* scores, size_t score_stride);
};

constexpr int kMaxDotQueries = 8;
constexpr int kMaxBlockRows = 12;

constexpr size_t kChunkDepth = 256;  // numbers that are summed one after another: see scoring.h

// What rows of one type need.
struct RowKernels {
  DotKernel dot[kMaxDotQueries];                        // by number of queries
  void (*widen)(const void* in, size_t n, float* out);  // to what a panel kernel takes
};

struct ScoringKernels {
  int lanes;  // of a vector
  int group;  // numbers of depth side by side in a panel
  RowKernels single, half, bfloat16;
  PanelKernel narrow, wide;  // one half as wide as the other

  // Σ_b scales[b] · Σ_k row[b][k] · query_b[k] of one row (L, d) and one query, with the bits that PanelKernel gives
  // them. Chunks of kChunkDepth numbers lie side by side in the query, lanes / group of them, those of all blocks one
  // after another and zeros where there is none: [k / group][chunk][k % group], depths padded with zeros to whole
  // vectors. Behind them in the same way what is left of each block. `sums` has room for one of every chunk.
  float (*score_row)(const float* row, const float* query, size_t L, size_t d, const float* scales,
                     float* sums);

  float (*sum_of_squares)(const float* in, size_t n);

  // Which of n scores are neither at most `above` nor at least `below`, each its own: NaNs and those beyond a
  // bound. Their indices are written to `which`, in order; returns how many.
  size_t (*outside)(const float* scores, const float* above, const float* below, size_t n, uint32_t* which);
};

// Those of the level in force.
const ScoringKernels& scoring_kernels();

// Of them those for rows of a type; narrow rows are widened first.
const RowKernels& row_kernels(RowType type);

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
