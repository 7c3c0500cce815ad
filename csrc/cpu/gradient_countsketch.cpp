#include "cpu/gradient_forms.h"

namespace trackstar {
namespace {

// Row o of the gradient is needed in one row of the sketch only, and goes there straight from the registers:
//
//   S[r, bucket(o)] += left[r, bucket(o), o] (ΔᵀX ∘ scale)[o]     Δ and X packed into panels
//   out = Σ_r S[r] right[r]ᵀ
class CountSketchProjection : ScaledProjection {
 public:
  CountSketchProjection(const GradientBatch& batch, const std::vector<Bucket>& buckets, float* out,
                        int threads)
      : ScaledProjection(batch, out, threads, (batch.in_features + kColumnBlock - 1) / kColumnBlock),
        buckets_(buckets),
        right_(pack_sketches(x_.right, x_.rank, x_.p, x_.in_features, kernels_.columns, threads)),
        strips_(one_per_thread(threads, kernels_.rows * padded_p_)) {}

  void run() const {
    const Buffer columns(most_rows() * padded_in_), rows(most_rows() * padded_out_);
    const Buffer sums(most_pieces() * sums_size_);
#pragma omp parallel num_threads(threads_)
    for (const Range& wave : waves_) {
      const Range run = pieces_of(wave);
      const int64_t column_block = block_for_threads(x_.in_features, kColumnBlock, wave.size());
#pragma omp for collapse(2) schedule(dynamic) nowait
      for (int64_t i = run.begin; i < run.end; ++i) {
        for (int64_t column = 0; column < x_.in_features; column += kColumnBlock) {
          pack_columns(i, column, run, columns);
        }
      }
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t i = run.begin; i < run.end; ++i) {
        for (int64_t row = 0; row < x_.out_features; row += kRowBlock) {
          const auto& [example, begin, tokens, first] = pieces_[i];
          of_element_.pack_a(at(x_.output_grads, begin * x_.out_features + row), x_.out_features, tokens,
                             std::min(kRowBlock, x_.out_features - row),
                             rows.at((row_of(i) - row_of(run.begin)) * padded_out_ + row * (tokens + 1)),
                             kernels_.rows * (tokens + 1));
        }
      }
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t part = wave.begin; part < wave.end; ++part) {
        for (int64_t column = 0; column < x_.in_features; column += column_block) {
          const int64_t width = std::min(column_block, x_.in_features - column);
          add_columns(parts_[part], column, width, run, rows, columns, sums);
        }
      }
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t i = run.begin; i < run.end; ++i) {
        for (int64_t row = 0; row < x_.q; row += kernels_.rows) {
          finish(pieces_[i], row, sums.at((i - run.begin) * sums_size_), strips_[this_thread()].at(0));
        }
      }
    }
  }

 private:
  // Columns [column, column + n) of S for every piece of a part.
  void add_columns(const Range& part, int64_t column, int64_t n, const Range& run, const Buffer& rows,
                   const Buffer& columns, const Buffer& sums) const {
    for (int64_t i = part.begin; i < part.end; ++i) {
      float* to = sums.at((i - run.begin) * sums_size_ + column);
      for (int64_t q = 0; q < x_.rank * padded_q_; ++q) {
        std::fill_n(to + q * sums_row_, round_up(n, kernels_.columns), 0.0f);
      }
    }
    for (int64_t row = 0; row < x_.out_features; row += kRowBlock) {
      const int64_t m = std::min(kRowBlock, x_.out_features - row);
      for (int64_t i = part.begin; i < part.end; ++i) {
        const int64_t tokens = pieces_[i].tokens, steps = steps_of(tokens),
                      offset = row_of(i) - row_of(run.begin);
        const float* rows_of_piece = rows.at(offset * padded_out_ + row * (tokens + 1));
        const float* columns_of_piece = packed_columns(i, column, run, columns);
        for (int64_t t = 0; t < steps; t += kDepth) {
          const Tiles::A a = {rows_of_piece + t * kernels_.rows, kernels_.rows * (tokens + 1), 1,
                              kernels_.rows};
          const Tiles::B b = {columns_of_piece + t * kernels_.columns, kernels_.columns * (tokens + 1)};
          of_element_.add_to_buckets(
              {{m, n, std::min(kDepth, steps - t), a, b},
               {x_.scale + row * x_.in_features + column, x_.in_features},
               x_.rank,
               buckets_.data() + row,
               padded_out_,
               {sums.at((i - run.begin) * sums_size_ + column), padded_q_ * sums_row_, sums_row_}});
        }
      }
    }
  }

  // Rows [row, row + kernels_.rows) of an example's result, from its S.
  void finish(const Piece& piece, int64_t row, const float* sums, float* strip) const {
    const Product::C c = {strip, kernels_.columns, padded_p_};
    for (int64_t r = 0; r < x_.rank; ++r) {
      for (int64_t i = 0; i < x_.in_features; i += kDepth) {
        const Tiles::A a = {sums + (r * padded_q_ + row) * sums_row_ + i, 0, sums_row_, 1};
        const Tiles::B b = {right_.at(r * padded_p_ * x_.in_features + i * kernels_.columns),
                            kernels_.columns * x_.in_features};
        const int64_t k = std::min(kDepth, x_.in_features - i);
        kernels_.multiply({{kernels_.rows, padded_p_, k, a, b}, c, r > 0 || i > 0, {}});
      }
    }
    write(piece.example, row, strip, !piece.first);
  }

  const std::vector<Bucket>& buckets_;
  const int64_t padded_out_ = round_up(x_.out_features, kRowBlock);
  const int64_t padded_q_ = round_up(x_.q, kernels_.rows);
  // An odd number of cache lines: rows of a power of two would all fall on the same cache sets.
  const int64_t sums_row_ = 16 * (round_up(padded_in_, 16) / 16 | 1);
  const int64_t sums_size_ = x_.rank * padded_q_ * sums_row_;
  const Buffer right_;
  const std::vector<Buffer> strips_;
};

}  // namespace

void project_countsketch(const GradientBatch& batch, const std::vector<Bucket>& buckets, float* out,
                         int threads) {
  CountSketchProjection(batch, buckets, out, threads).run();
}

}  // namespace trackstar
