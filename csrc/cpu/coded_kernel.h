// Micro-kernels of score_topk on narrow rows, one table per instruction set (csrc/cpu/isa.h).
//
// Codes are worked on as bytes code + bias, none of them negative. (Signs are bytes 2 or 0, their negated codes
// plus 1.) Queries are rounded to whole numbers from -top to top, so that Σ byte · query is exact in 32 bits,
// wrapping around on the way, if it starts from -bias · Σ query. Blocks of both are padded to a multiple of
// `elements`, the queries with zeros. Within every `elements` of a block int4's even ones come first.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/fetch_lines.h"

namespace trackstar {

constexpr size_t kMaxPiece = 65536;  // elements of a block whose products surely fit 32 bits
constexpr int kMaxFewQueries = 8;

// Up to eight rounded queries. A block's pieces are its first kMaxPiece elements, the next, and so on.
struct FewQueries {
  size_t L, d;
  const int8_t* codes;    // (L, count, padded d)
  const int32_t* starts;  // (L, pieces, count, lanes): where each lane's sum starts
  const float* scales;    // (L, count)
  bool woven;             // how rows behind this one are fetched, see fetch.h
};

// Few queries and one row, with scales (L):
//
//     scores[q] = Σ_b scales[b] · query.scales[b, q] · Σ_k ± code_b,k · query.codes[b, q, k]
using FewKernel = void (*)(const uint8_t* row, const float* scales, size_t block_bytes,
                           const FewQueries& queries, float* scores);

struct CodeKernels {
  int bias;
  float sign;  // -1 where bytes are of negated codes
  size_t elements;

  FewKernel few[kMaxFewQueries];  // by number of queries

  // A row's square Σ_b scales[b]² · Σ_k code_b,k², or a little less if there are codes of -128; `expand` also makes
  // bytes (L, padded d) of it and meanwhile fetches lines.
  double (*square)(const uint8_t* row, size_t block_bytes, const float* scales, size_t L, size_t d);
  double (*expand)(const uint8_t* row, size_t block_bytes, const float* scales, size_t L, size_t d,
                   const FetchLines& fetch, uint8_t* bytes);

  // scores[r] += scale[r] · Σ_k code_r,k · query[k] for eight rows' codes, k < d, rounded as DotKernel rounds it:
  // d is at most as many numbers as it takes at once.
  void (*exact)(const uint8_t* const* codes, const float* query, size_t d, const float* scale, float* scores);

  // d codes of a block as floats.
  void (*widen)(const uint8_t* codes, size_t d, float* out);
};
constexpr int kExactRows = 8;

// Many queries: panel[k / 4][queries][k % 4], and for a block of rows as bytes, row_stride from one to the next,
//
//     scores[r * score_stride + q] += scale[r] · query_scales[q] · (starts[q] + Σ_k rows[r * row_stride + k] · query_q[k])
//
// over k < depth, a multiple of 4. Meanwhile it fetches lines, unless it takes too little time for that.
struct CodedPanelKernel {
  int rows;
  int queries;
  bool fetches;
  void (*run)(const uint8_t* rows, size_t row_stride, const int8_t* panel, size_t depth,
              const FetchLines& fetch, const int32_t* starts, const float* scale, const float* query_scales,
              float* scores, size_t score_stride);
};

// A row of floats: so many runs of `size` numbers side by side, of_block of them to a block, and their bytes.
struct Runs {
  size_t count, size, padded, of_block;
};

// Squares of what rounding such numbers loses are still ordinary float32 numbers when they have been scaled.
constexpr float kSmallestBlock = 1e-6f;

struct CodedKernels {
  int lanes;
  int top;

  // One block of a query: codes round(values / scale) from -top to top, their sum over all blocks of squares Σ values²
  // added to squares[0] and of what they lose, Σ (values - scale · code)², to squares[1]; returns the scale.
  float (*round)(const float* values, size_t d, int8_t* codes, double* squares);

  // A row of floats, rounded run by run to bytes code + 128 with codes from -127 to 127, each run padded with 128 to whole
  // vectors. A run's scale goes to scales[i · stride], NaN where its numbers are too large or too small, and is
  // multiplied by that of its block. Adds the row's sum of squares Σ (block · values)² to squares[0] and of what
  // rounding takes from it to squares[1], up to their own rounding, as long as no block's scale but 0 is smaller than
  // kSmallestBlock. Meanwhile it fetches lines.
  void (*to_bytes)(const float* values, const Runs& runs, const float* blocks, const FetchLines& fetch,
                   uint8_t* bytes, float* scales, size_t stride, double* squares);

  // Score of one query and a row of `padded` bytes a block, at most kMaxPiece, whole vectors, block b's scale at
  // scales[b · stride].
  float (*product)(const uint8_t* bytes, size_t padded, const float* scales, size_t stride,
                   const FewQueries& query);

  // The largest magnitude of n numbers, NaN if there is a NaN, and the sum of their squares.
  void (*sizes)(const float* values, size_t n, float* largest, float* square);

  CodeKernels int8, int4, sign;

  // Panels are run between a call of `begin` and one of `end`, in the same thread.
  void (*begin)();
  void (*end)();
  CodedPanelKernel narrow, wide;

  // Which of n scores may reach their thresholds: those whose upper[q] = sign · scores[q] + a · wide[q] + b · far[q]
  // is not at most threshold[q]. Their indices are written to `which`, in order; returns how many.
  size_t (*reaching)(const float* scores, float sign, size_t n, float a, const float* wide, float b,
                     const float* far, const float* threshold, float* upper, uint32_t* which);

  // Which of n scores, that may be a · wide[q] + b · far[q] too small or too large, may be neither at most `above` nor
  // at least `below`, each its own. Their indices are written to `which`, in order; returns how many.
  size_t (*doubtful)(const float* scores, size_t n, float a, const float* wide, float b, const float* far,
                     const float* above, const float* below, uint32_t* which);
};

namespace baseline {
extern const CodedKernels coded_kernels;
}
namespace v3 {
extern const CodedKernels coded_kernels;
}
namespace v3_vnni {
extern const CodedKernels coded_kernels;
}
namespace v4 {
extern const CodedKernels coded_kernels;
}
namespace v4_vnni {
extern const CodedKernels coded_kernels;
}
namespace amx {
extern const CodedKernels coded_kernels;
}

}  // namespace trackstar
