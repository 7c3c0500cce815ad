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

// Blocks are whole tiles at every level, and an X panel of kDepth tokens fits in L1.
constexpr int64_t kRowBlock = 96;
constexpr int64_t kColumnBlock = 192;
constexpr int64_t kDepth = 256;  // most terms of one chain of additions

// Longer examples are summed piece by piece, which bounds the scratch memory. Short ones are taken up to
// eight at a time, which share a block of the scale while it is in cache.
constexpr int64_t kPieceTokens = 1024;
constexpr int64_t kPartPieces = 8;
constexpr int64_t kPartRows = kPieceTokens + kPartPieces;

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

  // Rows [row, row + kernels_.rows) of one example's result, from a strip with rows of padded_p_.
  void write(int64_t example, int64_t row, const float* strip, bool add) const {
    for (int64_t i = row; i < std::min(row + kernels_.rows, x_.q); ++i, strip += padded_p_) {
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
        scratch_(one_per_thread(threads,
                                kernels_.rows * std::max({x_.in_features, x_.out_features, padded_p_}))) {}

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
              Product::C c, float* scratch) const {
    const int64_t count = std::min(kRowBlock, tokens_ - token);
    const int64_t tail = count % kernels_.rows, whole = count - tail;
    const float* from = matrix + token * features;
    const Product::C c_tail = {c.at + whole * c.row, c.panel, c.row};
    // The last tile of the batch would read past its end: it gets a copy.
    if (tail > 0) pack_transposed(from + whole * features, tail, features, kernels_.rows, scratch);
    for (int64_t f = 0; f < features; f += kDepth) {
      const int64_t n = x_.rank * padded, k = std::min(kDepth, features - f);
      const Product::A a = {from + f, kernels_.rows * features, features, 1};
      const Product::A a_tail = {scratch + f * kernels_.rows, 0, 1, kernels_.rows};
      const Product::B b = {panels.at(f * kernels_.columns), kernels_.columns * features};
      kernels_.multiply({whole, n, k, a, b, c, f > 0, {}});
      if (tail > 0) kernels_.multiply({tail, n, k, a_tail, b, c_tail, f > 0, {}});
    }
  }

  // Rows [row, row + kernels_.rows) of an example's result.
  void contract(int64_t example, int64_t row, float* strip) const {
    const int64_t start = x_.offsets[example], end = x_.offsets[example + 1];
    if (start == end) return;
    const Product::C c = {strip, kernels_.columns, padded_p_};
    for (int64_t r = 0; r < x_.rank; ++r) {
      for (int64_t t = start; t < end; t += kDepth) {
        const Product::A a = {grad_sketches_.at(t * grad_row_ + r * padded_q_ + row), 0, 1, grad_row_};
        const Product::B b = {activation_sketches_.at(r * padded_p_ * padded_tokens_ + t * kernels_.columns),
                              kernels_.columns * padded_tokens_};
        const int64_t k = std::min(kDepth, end - t);
        kernels_.multiply({kernels_.rows, padded_p_, k, a, b, c, r > 0 || t > start, {}});
      }
    }
    write(example, row, strip, false);
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

// With a scale the gradient is needed, a block of 96 × 192 at a time:
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
            threads, std::max(kRowBlock * (kColumnBlock + kPartRows), kernels_.rows * padded_p_))) {
    plan();
  }

  void run() const {
    int64_t rows = 0, pieces = 0;
    for (const Range& wave : waves_) {
      rows = std::max(rows, rows_of(pieces_of(wave)));
      pieces = std::max(pieces, pieces_of(wave).size());
    }
    const Buffer columns(rows * padded_in_);
    const Buffer half(pieces * half_size_);
#pragma omp parallel num_threads(threads_)
    for (const Range& wave : waves_) {
      const Range run = pieces_of(wave);
      float* scratch = scratch_[this_thread()].at(0);
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t i = run.begin; i < run.end; ++i) {
        for (int64_t column = 0; column < x_.in_features; column += kColumnBlock) {
          const auto& [example, begin, tokens, first] = pieces_[i];
          kernels_.pack_b(x_.activations + begin * x_.in_features + column, x_.in_features, tokens,
                          std::min(kColumnBlock, x_.in_features - column),
                          columns.at((row_of(i) - row_of(run.begin)) * padded_in_ + column * (tokens + 1)),
                          kernels_.columns * (tokens + 1));
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
            rows_of({parts_.back().begin, index + 1}) <= kPartRows) {
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

  // Packed Δ and X have one spare row after each piece: panels of a power of two would all fall on the same
  // cache sets.
  int64_t row_of(int64_t piece) const { return pieces_[piece].begin + piece; }
  int64_t rows_of(const Range& run) const {
    return row_of(run.end - 1) + pieces_[run.end - 1].tokens + 1 - row_of(run.begin);
  }

  // Rows [row, row + kRowBlock) of H for every piece of a part.
  void contract_rows(const Range& part, int64_t row, const Range& run, const Buffer& columns,
                     const Buffer& half, float* scratch) const {
    const int64_t rows = std::min(kRowBlock, x_.out_features - row);
    float* const block = scratch;
    float* const deltas = scratch + kRowBlock * kColumnBlock;
    for (int64_t i = part.begin; i < part.end; ++i) {
      const auto& [example, begin, tokens, first] = pieces_[i];
      kernels_.pack_a(x_.output_grads + begin * x_.out_features + row, x_.out_features, tokens, rows,
                      deltas + (row_of(i) - row_of(part.begin)) * kRowBlock, kernels_.rows * (tokens + 1));
    }
    for (int64_t column = 0; column < x_.in_features; column += kColumnBlock) {
      const int64_t width = std::min(kColumnBlock, x_.in_features - column);
      const float* scale = x_.scale + row * x_.in_features + column;
      for (int64_t i = part.begin; i < part.end; ++i) {
        const int64_t tokens = pieces_[i].tokens;
        const float* deltas_of_piece = deltas + (row_of(i) - row_of(part.begin)) * kRowBlock;
        const float* columns_of_piece =
            columns.at((row_of(i) - row_of(run.begin)) * padded_in_ + column * (tokens + 1));
        for (int64_t t = 0; t < tokens; t += kDepth) {
          const int64_t k = std::min(kDepth, tokens - t);
          const Product::A a = {deltas_of_piece + t * kernels_.rows, kernels_.rows * (tokens + 1), 1,
                                kernels_.rows};
          const Product::B b = {columns_of_piece + t * kernels_.columns, kernels_.columns * (tokens + 1)};
          const Product::C c = {block, kernels_.columns, kColumnBlock};
          const Product::Scale s = {t + k == tokens ? scale : nullptr, x_.in_features};
          kernels_.multiply({rows, width, k, a, b, c, t > 0, s});
        }
        const Product::A a = {block, kernels_.rows * kColumnBlock, kColumnBlock, 1};
        const Product::B b = {right_.at(column * kernels_.columns), kernels_.columns * x_.in_features};
        const Product::C c = {half.at((i - run.begin) * half_size_ + row * kernels_.columns),
                              kernels_.columns * padded_out_, kernels_.columns};
        kernels_.multiply({rows, x_.rank * padded_p_, width, a, b, c, column > 0, {}});
      }
    }
  }

  // Rows [row, row + kernels_.rows) of an example's result, from its H.
  void finish(const Piece& piece, int64_t row, const float* half, float* strip) const {
    const Product::C c = {strip, kernels_.columns, padded_p_};
    for (int64_t r = 0; r < x_.rank; ++r) {
      const float* left = left_.at((r * padded_q_ + row) * x_.out_features);
      for (int64_t o = 0; o < x_.out_features; o += kDepth) {
        const Product::A a = {left + o * kernels_.rows, 0, 1, kernels_.rows};
        const Product::B b = {half + r * padded_p_ * padded_out_ + o * kernels_.columns,
                              kernels_.columns * padded_out_};
        const int64_t k = std::min(kDepth, x_.out_features - o);
        kernels_.multiply({kernels_.rows, padded_p_, k, a, b, c, r > 0 || o > 0, {}});
      }
    }
    write(piece.example, row, strip, !piece.first);
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
