#include "cpu/gradient_forms.h"

namespace trackstar {
namespace {

// A sketch of each token: dense in panels, or in buckets if it is a CountSketch.
struct TokenSketch {
  TokenSketch(const float* sketches, int64_t rank, int64_t rows, int64_t features, int64_t width, int threads)
      : features(features),
        padded(round_up(rows, width)),
        buckets(buckets_of(sketches, rank, rows, features, features)),
        panels(buckets.empty() ? pack_sketches(sketches, rank, rows, features, width, threads) : Buffer(0)) {}

  int64_t features, padded;
  std::vector<Bucket> buckets;
  Buffer panels;
};

// Without a scale the sum over tokens comes last and no gradient is needed: out = Σ_r (Δ left[r]ᵀ)ᵀ (X
// right[r]ᵀ).
class FoldedProjection : Projection {
 public:
  FoldedProjection(const GradientBatch& batch, float* out, int threads)
      : Projection(batch, out, threads),
        left_(x_.left, x_.rank, x_.q, x_.out_features, kernels_.columns, threads),
        right_(x_.right, x_.rank, x_.p, x_.in_features, kernels_.columns, threads),
        grad_sketches_(padded_tokens_ * grad_row_),
        activation_sketches_(padded_tokens_ * x_.rank * padded_p_),
        scratch_(one_per_thread(threads,
                                std::max({kRowBlock * kChunkRow, kernels_.rows * padded_p_,
                                          kMaxLanes * x_.rank * std::max(left_.padded, right_.padded)}))) {}

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
  // Sketches of tokens [token, token + token_block_) of a matrix.
  void sketch(const void* matrix, const TokenSketch& sketch, int64_t token, Product::C c,
              float* scratch) const {
    const int64_t tokens = std::min(token_block_, tokens_ - token), features = sketch.features;
    if (!sketch.buckets.empty()) {
      of_element_.sketch({at(matrix, token * features), features, tokens, features, x_.rank, sketch.padded,
                          sketch.buckets.data(), features, c, scratch});
      return;
    }
    // Whole tiles of floats are read where they are, the rest is widened, or saved from reading past the end.
    const int64_t in_place = x_.element == Element::float32 ? tokens / kernels_.rows * kernels_.rows : 0;
    const Product::C c_rest = {c.at + in_place * c.row, c.panel, c.row};
    for (int64_t f = 0; f < features; f += kDepth) {
      const int64_t n = x_.rank * sketch.padded, k = std::min(kDepth, features - f);
      const auto* from = static_cast<const float*>(at(matrix, token * features + f));
      const Tiles::A a = {from, kernels_.rows * features, features, 1};
      const Tiles::B b = {sketch.panels.at(f * kernels_.columns), kernels_.columns * features};
      kernels_.multiply({{in_place, n, k, a, b}, c, f > 0, {}});
      for (int64_t t = in_place; t < tokens; ++t) {
        of_element_.widen(at(matrix, (token + t) * features + f), k, scratch + (t - in_place) * kChunkRow);
      }
      const Tiles::A a_rest = {scratch, kernels_.rows * kChunkRow, kChunkRow, 1};
      kernels_.multiply({{tokens - in_place, n, k, a_rest, b}, c_rest, f > 0, {}});
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

  // A row of a chunk of kDepth features; rows a power of two apart would all fall on the same cache sets.
  static constexpr int64_t kChunkRow = kDepth + 16;

  const int64_t tokens_ = x_.offsets[x_.batch], padded_tokens_ = round_up(tokens_, kernels_.rows);
  const int64_t token_block_ = block_for_threads(tokens_, kRowBlock);
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
