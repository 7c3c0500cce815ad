// Projected per-example gradients of a linear layer, with an optional element-wise correction.
#pragma once

#include <cstdint>

namespace trackstar {

enum class Element { float32, bfloat16, float16 };

// Row-major contiguous arrays, float32 where nothing else is said; ΣT is the number of tokens of the whole
// batch.
struct GradientBatch {
  int64_t batch;             // B
  int64_t in_features;       // I
  int64_t out_features;      // O
  int64_t rank;              // r
  int64_t q, p;              // rows of the left and right sketch
  Element element;           // of activations and output_grads, which are widened as they are read
  const void* activations;   // (ΣT, I)
  const void* output_grads;  // (ΣT, O)
  const int64_t* offsets;    // (B + 1), ascending from 0 to ΣT: where each example's tokens begin
  const float* left;         // (r, q, O)
  const float* right;        // (r, p, I)
  const float* scale;        // (O, I), or null for no correction
};

// out[b] = Σ_r left[r] · (output_grads[b]ᵀ activations[b] ∘ scale) · right[r]ᵀ, shape (B, q, p).
//
// A left sketch with at most one non-zero number in every column, a CountSketch, costs one addition for each
// number of the gradient, whatever q is; only there may a NaN in a column of zeros be lost.
//
// Accumulates in float32. An example's result depends on its own tokens alone, bit for bit, on one
// instruction set level: not on its neighbours in the batch, on zero rows after its end, or on `threads`. An
// example without tokens gives zeros. No example's (O, I) gradient ever exists in memory.
void project_gradients(const GradientBatch& batch, float* out, int threads);

}  // namespace trackstar
