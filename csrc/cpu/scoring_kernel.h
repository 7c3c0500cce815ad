// Micro-kernels of score_topk, one table per instruction set (csrc/cpu/isa.h).
#pragma once

#include <stddef.h>

#include "cpu/narrow.h"

namespace trackstar {

// Both kinds add, for a block of rows and all their queries,
//
//     scores[r * score_stride + q] += scale[r] · Σ_k rows[r][k] · query_q[k]      k < depth
//
// with a sum over k that starts from zero in every call and is always taken in the same order.

// Few queries, each dense and query_stride after the one before; rows of float or Half.
struct DotKernel {
  int rows;
  void (*run)(const void* const* rows, const float* queries, size_t query_stride, size_t depth,
              const float* scale, float* scores, size_t score_stride);
};

// Many queries, panel[k * queries + q]. Meanwhile 4 · depth bytes at each ahead[r] are fetched into cache.
struct PanelKernel {
  int rows;
  int queries;
  void (*run)(const float* const* rows, const char* const* ahead, const float* panel, size_t depth,
              const float* scale, float* scores, size_t score_stride);
};

constexpr int kMaxDotQueries = 4;
constexpr int kMaxBlockRows = 12;

struct ScoringKernels {
  int lanes;                             // of a vector
  DotKernel dot_single[kMaxDotQueries];  // float rows, 1 to 4 queries
  DotKernel dot_half[kMaxDotQueries];    // Half rows
  PanelKernel narrow, wide;              // panels one and two vectors wide
  void (*widen)(const Half* in, size_t n, float* out);
  float (*sum_of_squares)(const float* in, size_t n);
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
