#include "cpu/gradient_forms.h"

namespace trackstar {
namespace {

// A sketch of each token, with dense rows or, if it is a CountSketch, in buckets.
struct TokenSketch {
  const float* rows;  // (r, count, features)
  int64_t count, features;
  int64_t padded;  // count, in whole tiles
  std::vector<Bucket> buckets;
};

// Without a scale the sum over tokens comes last and no gradient is needed: out = Σ_r (Δ left[r]ᵀ)ᵀ (X
// right[r]ᵀ).
class FoldedProjection : Projection {
 public:
  FoldedProjection(const GradientBatch& batch, float* out, int threads)
      : Projection(batch, out, threads),
        left_(sketch_of(x_.left, x_.q, x_.out_features)),
        right_(sketch_of(x_.right, x_.p, x_.in_features)),
        grad_sketches_(padded_tokens_ * grad_row_),
        activation_sketches_(padded_tokens_ * x_.rank * padded_p_),
        scratch_(
            one_per_thread(threads, std::max(kernels_.rows * padded_p_,
                                             kMaxLanes * x_.rank * std::max(left_.padded, right_.padded)))) {}

  void run() const {
#pragma omp parallel num_threads(threads_)
    {
      float* scratch = scratch_[this_thread()].at(0);
#pragma omp for schedule(dynamic)
      for (int64_t token = 0; token < tokens_; token += token_block_) {
        sketch(x_.output_grads, left_, token,
               {grad_sketches_.at(token * grad_row_), kernels_.columns, grad_row_}, scratch);
        sketch(x_.activations, right_, token,
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
  TokenSketch sketch_of(const float* rows, int64_t count, int64_t features) const {
    return {rows, count, features, round_up(count, kernels_.columns),
            buckets_of(rows, x_.rank, count, features, features)};
  }

  // Sketches of tokens [token, token + token_block_) of a matrix.
  void sketch(const void* matrix, const TokenSketch& sketch, int64_t token, Product::C c,
              float* scratch) const {
    const auto& [rows, count, features, padded, buckets] = sketch;
    const int64_t tokens = std::min(token_block_, tokens_ - token);
    const void* from = at(matrix, token * features);
    if (!buckets.empty()) {
      of_element_.sketch(
          {from, features, tokens, features, x_.rank, padded, buckets.data(), features, c, scratch});
      return;
    }
    for (int64_t r = 0; r < x_.rank; ++r, c.at += padded / kernels_.columns * c.panel) {
      for (int64_t f = 0; f < features; f += kDotDepth) {
        of_element_.dots({at(from, f), features, tokens, rows + r * count * features + f, features, count,
                          std::min(kDotDepth, features - f), c, f > 0});
      }
    }
  }

  // Rows [row, row + kernels_.rows) of an example's result.
  void contract(int64_t example, int64_t row, float* strip) const {
    const int64_t start = x_.offsets[example], end = x_.offsets[example + 1];
    if (start == end) return;
    const Product::C c = {strip, kernels_.columns, padded_p_};
    for (int64_t r = 0; r < x_.rank; ++r) {
      for (int64_t t = start; t < end; t += kDepth) {
        const Tiles::A a = {grad_sketches_.at(t * grad_row_ + r * left_.padded + row), 0, 1, grad_row_};
        const Tiles::B b = {activation_sketches_.at(r * padded_p_ * padded_tokens_ + t * kernels_.columns),
                            kernels_.columns * padded_tokens_};
        const int64_t k = std::min(kDepth, end - t);
        kernels_.multiply({{kernels_.rows, padded_p_, k, a, b}, c, r > 0 || t > start, {}});
      }
    }
    write(example, row, strip, false);
  }

  static constexpr int64_t kDotDepth = 2048;

  const int64_t tokens_ = x_.offsets[x_.batch], padded_tokens_ = round_up(tokens_, kernels_.rows);
  const int64_t token_block_ = block_for_threads(tokens_, kRowBlock, 1);
  const TokenSketch left_, right_;
  // The last tile of rows may read beyond the last sketch.
  const int64_t grad_row_ = x_.rank * left_.padded + kernels_.rows;
  const Buffer grad_sketches_;        // Δ left[r]ᵀ, one row for a token
  const Buffer activation_sketches_;  // X right[r]ᵀ, panels
  const std::vector<Buffer> scratch_;
};

}  // namespace

void project_folded(const GradientBatch& batch, float* out, int threads) {
  FoldedProjection(batch, out, threads).run();
}

}  // namespace trackstar
