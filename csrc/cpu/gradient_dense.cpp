#include "cpu/gradient_forms.h"

namespace trackstar {
namespace {

// The gradient is needed a block of 96 × 192 at a time:
//
//   g = ΔᵀX ∘ scale     Δ and X packed into panels
//   H (+)= g right[r]ᵀ  one row of H for each row of g
//   out = Σ_r left[r] H
class DenseProjection : ScaledProjection {
 public:
  DenseProjection(const GradientBatch& batch, float* out, int threads)
      : ScaledProjection(batch, out, threads, (batch.out_features + kRowBlock - 1) / kRowBlock),
        left_(pack_sketches(x_.left, x_.rank, x_.q, x_.out_features, kernels_.rows, threads)),
        right_(pack_sketches(x_.right, x_.rank, x_.p, x_.in_features, kernels_.columns, threads)),
        scratch_(one_per_thread(
            threads, std::max(kRowBlock * (kColumnBlock + kPartRows), kernels_.rows * padded_p_))) {}

  void run() const {
    const Buffer columns(most_rows() * padded_in_);
    const Buffer half(most_pieces() * half_size_);
#pragma omp parallel num_threads(threads_)
    for (const Range& wave : waves_) {
      const Range run = pieces_of(wave);
      const int64_t row_block = block_for_threads(x_.out_features, kRowBlock, wave.size());
      float* scratch = scratch_[this_thread()].at(0);
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t i = run.begin; i < run.end; ++i) {
        for (int64_t column = 0; column < x_.in_features; column += kColumnBlock) {
          pack_columns(i, column, run, columns);
        }
      }
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t part = wave.begin; part < wave.end; ++part) {
        for (int64_t row = 0; row < x_.out_features; row += row_block) {
          const int64_t rows = std::min(row_block, x_.out_features - row);
          contract_rows(parts_[part], row, rows, run, columns, half, scratch);
        }
      }
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t i = run.begin; i < run.end; ++i) {
        for (int64_t row = 0; row < x_.q; row += kernels_.rows) {
          finish(pieces_[i], row, half.at((i - run.begin) * half_size_), scratch);
        }
      }
    }
  }

 private:
  // Rows [row, row + rows) of H for every piece of a part.
  void contract_rows(const Range& part, int64_t row, int64_t rows, const Range& run, const Buffer& columns,
                     const Buffer& half, float* scratch) const {
    float* const block = scratch;
    float* const deltas = scratch + kRowBlock * kColumnBlock;
    for (int64_t i = part.begin; i < part.end; ++i) {
      const auto& [example, begin, tokens, first] = pieces_[i];
      of_element_.pack_a(at(x_.output_grads, begin * x_.out_features + row), x_.out_features, tokens, rows,
                         deltas + (row_of(i) - row_of(part.begin)) * kRowBlock, kernels_.rows * (tokens + 1));
    }
    for (int64_t column = 0; column < x_.in_features; column += kColumnBlock) {
      const int64_t width = std::min(kColumnBlock, x_.in_features - column);
      const float* scale = x_.scale + row * x_.in_features + column;
      for (int64_t i = part.begin; i < part.end; ++i) {
        const int64_t tokens = pieces_[i].tokens, steps = steps_of(tokens);
        const float* deltas_of_piece = deltas + (row_of(i) - row_of(part.begin)) * kRowBlock;
        const float* columns_of_piece = packed_columns(i, column, run, columns);
        for (int64_t t = 0; t < steps; t += kDepth) {
          const int64_t k = std::min(kDepth, steps - t);
          const Tiles::A a = {deltas_of_piece + t * kernels_.rows, kernels_.rows * (tokens + 1), 1,
                              kernels_.rows};
          const Tiles::B b = {columns_of_piece + t * kernels_.columns, kernels_.columns * (tokens + 1)};
          const Product::C c = {block, kernels_.columns, kColumnBlock};
          const Scale s = {t + k == steps ? scale : nullptr, x_.in_features};
          of_element_.multiply({{rows, width, k, a, b}, c, t > 0, s});
        }
        const Tiles::A a = {block, kernels_.rows * kColumnBlock, kColumnBlock, 1};
        const Tiles::B b = {right_.at(column * kernels_.columns), kernels_.columns * x_.in_features};
        const Product::C c = {half.at((i - run.begin) * half_size_ + row * kernels_.columns),
                              kernels_.columns * padded_out_, kernels_.columns};
        kernels_.multiply({{rows, x_.rank * padded_p_, width, a, b}, c, column > 0, {}});
      }
    }
  }

  // Rows [row, row + kernels_.rows) of an example's result, from its H.
  void finish(const Piece& piece, int64_t row, const float* half, float* strip) const {
    const Product::C c = {strip, kernels_.columns, padded_p_};
    for (int64_t r = 0; r < x_.rank; ++r) {
      const float* left = left_.at((r * padded_q_ + row) * x_.out_features);
      for (int64_t o = 0; o < x_.out_features; o += kDepth) {
        const Tiles::A a = {left + o * kernels_.rows, 0, 1, kernels_.rows};
        const Tiles::B b = {half + r * padded_p_ * padded_out_ + o * kernels_.columns,
                            kernels_.columns * padded_out_};
        const int64_t k = std::min(kDepth, x_.out_features - o);
        kernels_.multiply({{kernels_.rows, padded_p_, k, a, b}, c, r > 0 || o > 0, {}});
      }
    }
    write(piece.example, row, strip, !piece.first);
  }

  const int64_t padded_out_ = round_up(x_.out_features, kRowBlock);
  const int64_t padded_q_ = round_up(x_.q, kernels_.rows);
  const int64_t half_size_ = x_.rank * padded_p_ * padded_out_;  // H of a piece: panels of padded_out_ rows
  const Buffer left_, right_;
  const std::vector<Buffer> scratch_;
};

}  // namespace

void project_dense(const GradientBatch& batch, float* out, int threads) {
  DenseProjection(batch, out, threads).run();
}

}  // namespace trackstar
