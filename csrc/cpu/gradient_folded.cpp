#include "cpu/gradient_forms.h"

namespace trackstar {
namespace {

// Without a scale the sum over tokens comes last and no gradient is needed: out = Σ_r (Δ left[r]ᵀ)ᵀ (X
// right[r]ᵀ).
class FoldedProjection : Projection {
 public:
  FoldedProjection(const GradientBatch& batch, float* out, int threads)
      : Projection(batch, out, threads),
        left_(pack_sketches(x_.left, x_.rank, x_.q, x_.out_features, kernels_.columns, threads)),
        right_(pack_sketches(x_.right, x_.rank, x_.p, x_.in_features, kernels_.columns, threads)),
        grad_sketches_(padded_tokens_ * grad_row_),
        activation_sketches_(padded_tokens_ * x_.rank * padded_p_),
        scratch_(one_per_thread(threads, std::max(kRowBlock * kChunkRow, kernels_.rows * padded_p_))) {}

  void run() const {
#pragma omp parallel num_threads(threads_)
    {
      float* scratch = scratch_[this_thread()].at(0);
#pragma omp for schedule(dynamic)
      for (int64_t token = 0; token < tokens_; token += kRowBlock) {
        sketch(x_.output_grads, x_.out_features, left_, padded_q_, token,
               {grad_sketches_.at(token * grad_row_), kernels_.columns, grad_row_}, scratch);
        sketch(x_.activations, x_.in_features, right_, padded_p_, token,
               {activation_sketches_.at(token * kernels_.columns), kernels_.columns * padded_tokens_,
                kernels_.columns},
               scratch);
      }
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t example = 0; example < x_.batch; ++example) {
        for (int64_t row = 0; row < x_.q; row += kernels_.rows) contract(example, row, scratch);
      }
    }
  }

 private:
  // Tokens [token, token + kRowBlock) of a matrix (ΣT, features) times every panel of a sketch.
  void sketch(const void* matrix, int64_t features, const Buffer& panels, int64_t padded, int64_t token,
              Product::C c, float* scratch) const {
    const int64_t tokens = std::min(kRowBlock, tokens_ - token), n = x_.rank * padded;
    for (int64_t f = 0; f < features; f += kDepth) {
      const int64_t k = std::min(kDepth, features - f);
      for (int64_t t = 0; t < tokens; ++t) {
        packing_.widen(at(matrix, (token + t) * features + f), k, scratch + t * kChunkRow);
      }
      const Tiles::A a = {scratch, kernels_.rows * kChunkRow, kChunkRow, 1};
      const Tiles::B b = {panels.at(f * kernels_.columns), kernels_.columns * features};
      kernels_.multiply({{tokens, n, k, a, b}, c, f > 0, {}});
    }
  }

  // Rows [row, row + kernels_.rows) of an example's result.
  void contract(int64_t example, int64_t row, float* strip) const {
    const int64_t start = x_.offsets[example], end = x_.offsets[example + 1];
    if (start == end) return;
    const Product::C c = {strip, kernels_.columns, padded_p_};
    for (int64_t r = 0; r < x_.rank; ++r) {
      for (int64_t t = start; t < end; t += kDepth) {
        const Tiles::A a = {grad_sketches_.at(t * grad_row_ + r * padded_q_ + row), 0, 1, grad_row_};
        const Tiles::B b = {activation_sketches_.at(r * padded_p_ * padded_tokens_ + t * kernels_.columns),
                              kernels_.columns * padded_tokens_};
        const int64_t k = std::min(kDepth, end - t);
        kernels_.multiply({{kernels_.rows, padded_p_, k, a, b}, c, r > 0 || t > start, {}});
      }
    }
    write(example, row, strip, false);
  }

  // A row of a chunk of kDepth features; rows a power of two apart would all fall on the same cache sets.
  static constexpr int64_t kChunkRow = kDepth + 16;

  const int64_t tokens_ = x_.offsets[x_.batch], padded_tokens_ = round_up(tokens_, kernels_.rows);
  const int64_t padded_q_ = round_up(x_.q, kernels_.columns);
  // The last tile of rows may read beyond the last sketch.
  const int64_t grad_row_ = x_.rank * padded_q_ + kernels_.rows;
  const Buffer left_, right_;
  const Buffer grad_sketches_;        // Δ left[r]ᵀ, one row for a token
  const Buffer activation_sketches_;  // X right[r]ᵀ, panels
  const std::vector<Buffer> scratch_;
};

}  // namespace

void project_folded(const GradientBatch& batch, float* out, int threads) {
  FoldedProjection(batch, out, threads).run();
}

}  // namespace trackstar
