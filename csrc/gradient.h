// Projected per-example gradients of a linear layer, with an optional element-wise correction.
#pragma once

#include <cstdint>

namespace trackstar {

// Row-major contiguous float32 arrays; ΣT is the number of tokens of the whole batch.
struct GradientBatch {
  int64_t batch;              // B
  int64_t in_features;        // I
  int64_t out_features;       // O
  int64_t rank;               // r
  int64_t q, p;               // rows of the left and right sketch
  const float* activations;   // (ΣT, I)
  const float* output_grads;  // (ΣT, O)
  const int64_t* offsets;     // (B + 1), ascending from 0 to ΣT: where each example's tokens begin
  const float* left;          // (r, q, O)
  const float* right;         // (r, p, I)
  const float* scale;         // (O, I), or null for no correction
};

// out[b] = Σ_r left[r] · (output_grads[b]ᵀ activations[b] ∘ scale) · right[r]ᵀ, shape (B, q, p).
//
// Accumulates in float32. An example's result depends on its own tokens alone, bit for bit, on one
// instruction set level: not on its neighbours in the batch, on zero rows after its end, or on `threads`. An
// example without tokens gives zeros. No example's (O, I) gradient ever exists in memory.
void project_gradients(const GradientBatch& batch, float* out, int threads);

}  // namespace trackstar
