// How the work of project_gradients is cut up. Everything is one micro-kernel, Product; examples are cut at
// fixed places and every sum runs in one order, so a result is the same in any batch and on any number of
// threads.
#include "gradient.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/gradient_kernel.h"
#include "cpu/isa.h"

namespace trackstar {
namespace {

constexpr int64_t kRowBlock = 48;      // rows of a block: whole tiles at every level
constexpr int64_t kColumnBlock = 192;  // columns of a block: whole tiles at every level, at most kDepth
constexpr int64_t kDepth = 256;        // terms of one chain of additions: a panel of this depth fits in L1
constexpr int64_t kPieceTokens =
    1024;  // a longer example is summed piece by piece, which bounds the scratch memory
constexpr int64_t kPartPieces = 8;  // short examples that share a block of the scale while it is in cache

const GradientKernels& kernels_in_force() {
  switch (isa()) {
#ifdef TRACKSTAR_HAS_v3
    case Isa::v3:
      return v3::gradient_kernels;
#endif
#ifdef TRACKSTAR_HAS_v4
    case Isa::v4:
      return v4::gradient_kernels;
#endif
    default:
      return baseline::gradient_kernels;
  }
}

int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Uninitialised floats on a cache line boundary.
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : memory_(static_cast<float*>(std::aligned_alloc(kLine, round_up(size * sizeof(float), kLine))),
                std::free) {
    if (size > 0 && !memory_) throw std::bad_alloc();
  }
  float* at(int64_t index) const { return memory_.get() + index; }

 private:
  static constexpr int64_t kLine = 64;
  std::unique_ptr<float, decltype(&std::free)> memory_;
};

std::vector<Buffer> one_per_thread(int threads, int64_t size) {
  std::vector<Buffer> buffers;
  for (int i = 0; i < threads; ++i) buffers.emplace_back(size);
  return buffers;
}

// One panel, `width` wide, out of the rows of a row-major matrix: panel[t * width + i] = from[i, t], zeros
// after `rows`.
void pack_transposed(const float* from, int64_t rows, int64_t depth, int64_t width, float* panel) {
  for (int64_t t = 0; t < depth; ++t) {
    for (int64_t i = 0; i < std::min(rows, width); ++i) panel[t * width + i] = from[i * depth + t];
    for (int64_t i = rows; i < width; ++i) panel[t * width + i] = 0.0f;
  }
}

// The sketches (rank, rows, depth) as panels, each r padded to whole panels.
Buffer pack_sketches(const float* sketches, int64_t rank, int64_t rows, int64_t depth, int64_t width,
                     int threads) {
  const int64_t padded = round_up(rows, width);
  Buffer panels(rank * padded * depth);
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t r = 0; r < rank; ++r) {
    for (int64_t i = 0; i < rows; i += width) {
      pack_transposed(sketches + (r * rows + i) * depth, rows - i, depth, width,
                      panels.at((r * padded + i) * depth));
    }
  }
  return panels;
}

// What both forms know about a call.
class Projection {
 protected:
  Projection(const GradientBatch& batch, float* out, int threads)
      : x_(batch), out_(out), threads_(threads), kernels_(kernels_in_force()) {}

  // Rows [row, row + kernels_.rows) of one example's result, from a strip with rows of `length`.
  void write(int64_t example, int64_t row, const float* strip, int64_t length, bool add) const {
    for (int64_t i = row; i < std::min(row + kernels_.rows, x_.q); ++i, strip += length) {
      float* to = out_ + (example * x_.q + i) * x_.p;
      for (int64_t j = 0; j < x_.p; ++j) to[j] = add ? to[j] + strip[j] : strip[j];
    }
  }

  const GradientBatch x_;
  float* const out_;
  const int threads_;
  const GradientKernels& kernels_;
  const int64_t padded_p_ = round_up(x_.p, kernels_.columns);
};

// Without a scale the sum over tokens comes last, out = Σ_r (Δ left[r]ᵀ)ᵀ (X right[r]ᵀ), and no gradient is
// needed.
class FoldedProjection : Projection {
 public:
  FoldedProjection(const GradientBatch& batch, float* out, int threads)
      : Projection(batch, out, threads),
        left_(pack_sketches(x_.left, x_.rank, x_.q, x_.out_features, kernels_.columns, threads)),
        right_(pack_sketches(x_.right, x_.rank, x_.p, x_.in_features, kernels_.columns, threads)),
        grad_sketches_(padded_tokens_ * grad_row_),
        activation_sketches_(padded_tokens_ * x_.rank * padded_p_),
        scratch_(one_per_thread(threads, std::max(kernels_.rows * std::max(x_.in_features, x_.out_features),
                                                  kernels_.rows * padded_p_))) {}

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
  void sketch(const float* matrix, int64_t features, const Buffer& panels, int64_t padded, int64_t token,
              decltype(Product::c) c, float* scratch) const {
    const int64_t count = std::min(kRowBlock, tokens_ - token);
    const int64_t tail = count % kernels_.rows, whole = count - tail;
    const float* from = matrix + token * features;
    // The last tile of the batch would read past its end: it gets a copy.
    if (tail > 0) pack_transposed(from + whole * features, tail, features, kernels_.rows, scratch);
    for (int64_t f = 0; f < features; f += kDepth) {
      const int64_t n = x_.rank * padded, depth = std::min(kDepth, features - f);
      const decltype(Product::b) b = {panels.at(f * kernels_.columns), kernels_.columns * features};
      kernels_.multiply(
          {whole, n, depth, {from + f, kernels_.rows * features, features, 1}, b, c, f > 0, {}});
      kernels_.multiply({tail,
                         n,
                         depth,
                         {scratch + f * kernels_.rows, 0, 1, kernels_.rows},
                         b,
                         {c.at + whole * c.row, c.panel, c.row},
                         f > 0,
                         {}});
    }
  }

  // Rows [row, row + kernels_.rows) of an example's result.
  void contract(int64_t example, int64_t row, float* strip) const {
    const int64_t end = x_.offsets[example + 1];
    bool first = true;
    for (int64_t r = 0; r < x_.rank; ++r) {
      for (int64_t t = x_.offsets[example]; t < end; t += kDepth, first = false) {
        kernels_.multiply({kernels_.rows,
                           padded_p_,
                           std::min(kDepth, end - t),
                           {grad_sketches_.at(t * grad_row_ + r * padded_q_ + row), 0, 1, grad_row_},
                           {activation_sketches_.at(r * padded_p_ * padded_tokens_ + t * kernels_.columns),
                            kernels_.columns * padded_tokens_},
                           {strip, kernels_.columns, padded_p_},
                           !first,
                           {}});
      }
    }
    if (!first) write(example, row, strip, padded_p_, false);
  }

  const int64_t tokens_ = x_.offsets[x_.batch], padded_tokens_ = round_up(tokens_, kernels_.rows);
  const int64_t padded_q_ = round_up(x_.q, kernels_.columns);
  // The last tile of rows may read beyond the last sketch.
  const int64_t grad_row_ = x_.rank * padded_q_ + kernels_.rows;
  const Buffer left_, right_;
  const Buffer grad_sketches_;        // Δ left[r]ᵀ, one row for a token
  const Buffer activation_sketches_;  // X right[r]ᵀ, panels
  const std::vector<Buffer> scratch_;
};

// A run of tokens of one example; `begin` counts over the whole batch.
struct Piece {
  int64_t example, begin, tokens;
  bool first;
};

// Consecutive items [begin, end) of a list.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// With a scale the gradient is needed, a block of 48 × 192 at a time:
//
//   g = ΔᵀX ∘ scale     Δ and X packed into panels
//   H (+)= g right[r]ᵀ  one row of H for each row of g
//   out = Σ_r left[r] H
class ScaledProjection : Projection {
 public:
  ScaledProjection(const GradientBatch& batch, float* out, int threads)
      : Projection(batch, out, threads),
        left_(pack_sketches(x_.left, x_.rank, x_.q, x_.out_features, kernels_.rows, threads)),
        right_(pack_sketches(x_.right, x_.rank, x_.p, x_.in_features, kernels_.columns, threads)),
        scratch_(one_per_thread(
            threads, std::max(kRowBlock * (kColumnBlock + kPieceTokens), kernels_.rows * padded_p_))) {
    plan();
  }

  void run() const {
    int64_t tokens = 0, pieces = 0;
    for (const Range& wave : waves_) {
      tokens = std::max(tokens, tokens_of(pieces_of(wave)));
      pieces = std::max(pieces, pieces_of(wave).size());
    }
    const Buffer columns(tokens * padded_in_);
    const Buffer half(pieces * half_size_);
#pragma omp parallel num_threads(threads_)
    for (const Range& wave : waves_) {
      const Range run = pieces_of(wave);
      float* scratch = scratch_[this_thread()].at(0);
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t i = run.begin; i < run.end; ++i) {
        for (int64_t column = 0; column < x_.in_features; column += kColumnBlock) {
          pack_columns(pieces_[i], column, columns.at(columns_of(i, run)));
        }
      }
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t part = wave.begin; part < wave.end; ++part) {
        for (int64_t row = 0; row < x_.out_features; row += kRowBlock) {
          contract_rows(parts_[part], row, run, columns, half, scratch);
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
  // Cuts the batch into pieces, parts (runs of pieces that one thread takes together) and waves (runs of
  // parts that are in memory together, enough to keep every thread busy). Pieces of one example add to the
  // same result, so no wave holds two of them.
  void plan() {
    const int64_t parts_of_wave = std::max<int64_t>(1, 4 * threads_ * kRowBlock / padded_out_);
    for (int64_t example = 0; example < x_.batch; ++example) {
      const int64_t start = x_.offsets[example], end = x_.offsets[example + 1];
      for (int64_t begin = start; begin < end; begin += kPieceTokens) {
        const int64_t index = pieces_.size(), part = parts_.size();
        pieces_.push_back({example, begin, std::min(kPieceTokens, end - begin), begin == start});
        if (!parts_.empty() && begin == start && parts_.back().size() < kPartPieces &&
            tokens_of({parts_.back().begin, index + 1}) <= kPieceTokens) {
          ++parts_.back().end;
          continue;
        }
        parts_.push_back({index, index + 1});
        if (!waves_.empty() && begin == start && waves_.back().size() < parts_of_wave) {
          ++waves_.back().end;
        } else {
          waves_.push_back({part, part + 1});
        }
      }
    }
  }

  Range pieces_of(const Range& wave) const { return {parts_[wave.begin].begin, parts_[wave.end - 1].end}; }

  int64_t tokens_of(const Range& run) const {
    return pieces_[run.end - 1].begin + pieces_[run.end - 1].tokens - pieces_[run.begin].begin;
  }

  // Where a piece's packed X begins.
  int64_t columns_of(int64_t piece, const Range& run) const {
    return (pieces_[piece].begin - pieces_[run.begin].begin) * padded_in_;
  }

  // A block of columns of X, as panels.
  void pack_columns(const Piece& piece, int64_t column, float* panels) const {
    const int64_t end = std::min(x_.in_features, column + kColumnBlock);
    for (int64_t i = column; i < end; i += kernels_.columns) {
      kernels_.pack_b(x_.activations + piece.begin * x_.in_features + i, x_.in_features, piece.tokens,
                      std::min(kernels_.columns, end - i), panels + i * piece.tokens);
    }
  }

  // Rows [row, row + kRowBlock) of H for every piece of a part.
  void contract_rows(const Range& part, int64_t row, const Range& run, const Buffer& columns,
                     const Buffer& half, float* scratch) const {
    const int64_t rows = std::min(kRowBlock, x_.out_features - row), first_token = pieces_[part.begin].begin;
    float* const block = scratch;
    float* const deltas = scratch + kRowBlock * kColumnBlock;
    for (int64_t i = part.begin; i < part.end; ++i) {
      const auto& [example, begin, tokens, first] = pieces_[i];
      for (int64_t o = 0; o < rows; o += kernels_.rows) {
        kernels_.pack_a(x_.output_grads + begin * x_.out_features + row + o, x_.out_features, tokens,
                        std::min(kernels_.rows, rows - o),
                        deltas + (begin - first_token) * kRowBlock + o * tokens);
      }
    }
    for (int64_t column = 0; column < x_.in_features; column += kColumnBlock) {
      const int64_t width = std::min(kColumnBlock, x_.in_features - column);
      const float* scale = x_.scale + row * x_.in_features + column;
      for (int64_t i = part.begin; i < part.end; ++i) {
        const int64_t tokens = pieces_[i].tokens;
        const float* a = deltas + (pieces_[i].begin - first_token) * kRowBlock;
        const float* b = columns.at(columns_of(i, run) + column * tokens);
        for (int64_t t = 0; t < tokens; t += kDepth) {
          const int64_t depth = std::min(kDepth, tokens - t);
          kernels_.multiply({rows,
                             width,
                             depth,
                             {a + t * kernels_.rows, kernels_.rows * tokens, 1, kernels_.rows},
                             {b + t * kernels_.columns, kernels_.columns * tokens},
                             {block, kernels_.columns, kColumnBlock},
                             t > 0,
                             {t + depth == tokens ? scale : nullptr, x_.in_features}});
        }
        kernels_.multiply({rows,
                           x_.rank * padded_p_,
                           width,
                           {block, kernels_.rows * kColumnBlock, kColumnBlock, 1},
                           {right_.at(column * kernels_.columns), kernels_.columns * x_.in_features},
                           {half.at((i - run.begin) * half_size_ + row * kernels_.columns),
                            kernels_.columns * padded_out_, kernels_.columns},
                           column > 0,
                           {}});
      }
    }
  }

  // Rows [row, row + kernels_.rows) of an example's result, from its H.
  void finish(const Piece& piece, int64_t row, const float* half, float* strip) const {
    for (int64_t r = 0; r < x_.rank; ++r) {
      for (int64_t o = 0; o < x_.out_features; o += kDepth) {
        kernels_.multiply(
            {kernels_.rows,
             padded_p_,
             std::min(kDepth, x_.out_features - o),
             {left_.at((r * padded_q_ + row) * x_.out_features + o * kernels_.rows), 0, 1, kernels_.rows},
             {half + r * padded_p_ * padded_out_ + o * kernels_.columns, kernels_.columns * padded_out_},
             {strip, kernels_.columns, padded_p_},
             r > 0 || o > 0,
             {}});
      }
    }
    write(piece.example, row, strip, padded_p_, !piece.first);
  }

  const int64_t padded_in_ = round_up(x_.in_features, kernels_.columns);
  const int64_t padded_out_ = round_up(x_.out_features, kRowBlock);
  const int64_t padded_q_ = round_up(x_.q, kernels_.rows);
  const int64_t half_size_ = x_.rank * padded_p_ * padded_out_;  // H of a piece: panels of padded_out_ rows
  const Buffer left_, right_;
  const std::vector<Buffer> scratch_;
  std::vector<Piece> pieces_;
  std::vector<Range> parts_, waves_;
};

}  // namespace

void project_gradients(const GradientBatch& batch, float* out, int threads) {
  std::fill_n(out, batch.batch * batch.q * batch.p, 0.0f);
  if (batch.rank == 0 || batch.in_features == 0 || batch.out_features == 0) return;  // an empty sum
  if (batch.scale) {
    ScaledProjection(batch, out, threads).run();
  } else {
    FoldedProjection(batch, out, threads).run();
  }
}

}  // namespace trackstar
