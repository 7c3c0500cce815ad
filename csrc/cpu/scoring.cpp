#include "scoring.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/coded.h"
#include "cpu/isa.h"
#include "cpu/reservoir.h"
#include "cpu/scoring_kernel.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace trackstar {

const ScoringKernels& scoring_kernels() {
  switch (isa()) {
#ifdef TRACKSTAR_HAS_v4
    case Isa::v4_bf16:
    case Isa::v4_vnni:
    case Isa::v4:
      return v4::scoring_kernels;
#endif
#ifdef TRACKSTAR_HAS_v3
    case Isa::v3_vnni:
    case Isa::v3:
      return v3::scoring_kernels;
#endif
    default:
      return baseline::scoring_kernels;
  }
}

namespace {

constexpr size_t kDepth = 256;        // numbers that are summed one after another: see scoring.h
constexpr size_t kTileRows = 48;      // rows that meet all queries before the next; a multiple of any block
constexpr size_t kPanelsAtOnce = 16;  // whose chunks fit the second-level cache

const ScoringKernels& kernels() { return scoring_kernels(); }

using Floats = Aligned<float>;

// ---- What rows are multiplied with
// -------------------------------------------------------------------------

// Vectors first … of a matrix in the layout of a panel kernel, padded with zeros.
struct Panel {
  const PanelKernel* kernel;
  size_t first;
  Floats values;
};

// A matrix of `count` vectors: dense for a dot kernel if they are few, otherwise in panels.
struct Matrix {
  size_t count, length;
  Floats dense;
  std::vector<Panel> panels;

  // Columns of a result, padding included.
  size_t width() const {
    return panels.empty() ? count : panels.back().first + static_cast<size_t>(panels.back().kernel->queries);
  }
};

Matrix panels_of(const float* dense, size_t count, size_t length) {
  const auto &narrow = kernels().narrow, &wide = kernels().wide;
  Matrix matrix{count, length, {}, {}};
  for (size_t first = 0; first < count;) {
    const PanelKernel& kernel = count - first <= static_cast<size_t>(narrow.queries) ? narrow : wide;
    const size_t width = kernel.queries, last = std::min(first + width, count);
    Floats values(length * width);
    for (size_t q = first; q < last; ++q) {
      for (size_t i = 0; i < length; ++i) values[i * width + (q - first)] = dense[q * length + i];
    }
    matrix.panels.push_back({&kernel, first, std::move(values)});
    first = last;
  }
  return matrix;
}

Matrix matrix_of(const float* dense, size_t count, size_t length) {
  if (count <= kMaxDotQueries) return {count, length, Floats(dense, dense + count * length), {}};
  return panels_of(dense, count, length);
}

// ---- Rows times a matrix
// -----------------------------------------------------------------------------------

// What a panel kernel takes of a block of rows.
struct Block {
  const float* rows[kMaxBlockRows];
  const char* ahead[kMaxBlockRows];
  float scale[kMaxBlockRows];
};

void multiply_panels(const Block& block, const Panel* begin, const Panel* end, size_t from, size_t depth,
                     float* out, size_t stride) {
  for (const Panel* panel = begin; panel != end; ++panel) {
    const PanelKernel& kernel = *panel->kernel;
    kernel.run(block.rows, block.ahead, panel->values.data() + from * kernel.queries, depth, block.scale,
               out + panel->first, stride);
  }
}

// Tiles of the store's rows. Kernels take whole blocks of rows: past the end of a tile its last row stands
// in, and what becomes of that is not looked at.
class Reader {
 public:
  // The smallest scores are the largest negated ones.
  Reader(const Rows& rows, bool largest)
      : rows_(rows), sign_(largest ? 1.0f : -1.0f), wide_(kMaxBlockRows * kDepth) {}

  // out (count, stride) += block `b` of rows row … row + count - 1 times numbers from … from + d - 1 of the
  // matrix, of which a range of panels takes part, if it has panels.
  void multiply(size_t row, size_t count, size_t b, const Matrix& matrix, size_t begin, size_t end,
                size_t from, float* out, size_t stride) {
    if (matrix.panels.empty()) {
      multiply_dots(row, count, b, matrix, from, out, stride);
      return;
    }
    const Panel* panels = matrix.panels.data();
    const int block_rows = panels->kernel->rows;
    for (size_t i = 0; i < rows_.d; i += kDepth) {
      size_t depth = std::min(kDepth, rows_.d - i);
      for (size_t first = 0; first < count; first += block_rows) {
        Block block;
        for (int r = 0; r < block_rows; ++r) {
          size_t n = row + std::min(first + r, count - 1);
          block.rows[r] = single(at(n, b * rows_.d + i), depth, r);
          block.ahead[r] = next(n, b * rows_.d + i + depth);
          block.scale[r] = scale(n, b);
        }
        multiply_panels(block, panels + begin, panels + end, from + i, depth, out + first * stride, stride);
      }
    }
  }

 private:
  void multiply_dots(size_t row, size_t count, size_t b, const Matrix& matrix, size_t from, float* out,
                     size_t stride) const {
    const DotKernel& kernel =
        (rows_.type == RowType::float16 ? kernels().dot_half : kernels().dot_single)[matrix.count - 1];
    const size_t max_depth = kDepth * kernels().lanes;
    const void* rows[kMaxBlockRows];
    float scales[kMaxBlockRows];
    for (size_t first = 0; first < count; first += kernel.rows) {
      for (size_t i = 0; i < rows_.d; i += max_depth) {
        for (int r = 0; r < kernel.rows; ++r) {
          size_t n = row + std::min(first + r, count - 1);
          rows[r] = at(n, b * rows_.d + i);
          scales[r] = scale(n, b);
        }
        kernel.run(rows, matrix.dense.data() + from + i, matrix.length, std::min(max_depth, rows_.d - i),
                   scales, out + first * stride, stride);
      }
    }
  }

  // Address of number i of row n.
  const void* at(size_t n, size_t i) const {
    ptrdiff_t offset = static_cast<ptrdiff_t>(n) * rows_.stride + static_cast<ptrdiff_t>(i);
    if (rows_.type == RowType::float16) return static_cast<const Half*>(rows_.values) + offset;
    return static_cast<const float*>(rows_.values) + offset;
  }

  float scale(size_t n, size_t b) const {
    return rows_.scales ? sign_ * rows_.scales[n * rows_.L + b] : sign_;
  }

  // `depth` numbers as floats: the store's own, or row r of wide_.
  const float* single(const void* stored, size_t depth, int r) {
    if (rows_.type == RowType::float32) return static_cast<const float*>(stored);
    float* wide = wide_.data() + r * kDepth;
    kernels().widen(static_cast<const Half*>(stored), depth, wide);
    return wide;
  }

  // Where reading goes on after number i - 1 of row n: here, or a tile further.
  const char* next(size_t n, size_t i) const {
    bool finished = i == rows_.L * rows_.d;
    return static_cast<const char*>(finished ? at(std::min(n + kTileRows, rows_.N - 1), 0) : at(n, i));
  }

  Rows rows_;
  float sign_;
  Floats wide_;  // a block of float16 rows, widened
};

// ---- Scans
// -------------------------------------------------------------------------------------------------

// One thread's share of the rows: its working memory, and the best it has seen for each query.
class Scan {
 public:
  Scan(const Rows& rows, const TopK& top, size_t width)
      : reader_(rows, top.largest), width_(width), scores_(kTileRows * width) {
    reservoirs_.reserve(top.Q);
    for (size_t q = 0; q < top.Q; ++q) reservoirs_.emplace_back(top.k, rows.N);
  }
  virtual ~Scan() = default;

  // Scores a tile of rows. Calls come in ascending order.
  void run(size_t row, size_t count) {
    std::fill(scores_.begin(), scores_.end(), 0.0f);
    score(row, count);
    for (size_t r = 0; r < count; ++r) {
      if (!valid(row + r)) continue;
      const float* scores = scores_.data() + r * width_;
      for (size_t q = 0; q < reservoirs_.size(); ++q) {
        if (reservoirs_[q].wants(scores[q])) reservoirs_[q].add(scores[q], static_cast<int64_t>(row + r));
      }
    }
  }

  const std::vector<Candidate>& candidates(size_t query) const { return reservoirs_[query].candidates(); }

 protected:
  // Adds the scores of a tile to scores_, which are zero, the smallest wanted ones negated.
  virtual void score(size_t row, size_t count) = 0;
  virtual bool valid(size_t) const { return true; }

  Reader reader_;
  size_t width_;
  Floats scores_;  // (row of the tile, width): queries and padding

 private:
  std::vector<Reservoir> reservoirs_;
};

class ScoreScan : public Scan {
 public:
  ScoreScan(const Matrix& queries, const Rows& rows, const TopK& top)
      : Scan(rows, top, queries.width()), queries_(queries), L_(rows.L), d_(rows.d) {}

 private:
  void score(size_t row, size_t count) override {
    size_t begin = 0;
    do {
      size_t end = std::min(begin + kPanelsAtOnce, queries_.panels.size());
      for (size_t b = 0; b < L_; ++b) {
        reader_.multiply(row, count, b, queries_, begin, end, b * d_, scores_.data(), width_);
      }
      begin = end;
    } while (begin < queries_.panels.size());
  }

  const Matrix& queries_;
  size_t L_, d_;
};

}  // namespace

struct Task::Layout {
  Shape shape;
  struct Block {
    Matrix factors;  // rank vectors of length d
    Matrix combine;  // Q vectors of length rank
  };
  std::vector<Block> blocks;
  Floats weights;

  size_t padded_queries() const { return blocks.front().combine.width(); }
  size_t padded_rank() const { return blocks.front().factors.width(); }
};

Task::Task(const Shape& shape) : layout_(new Layout{shape, {}, {}}) { layout_->blocks.resize(shape.L); }
Task::~Task() = default;

void Task::set_block(size_t b, const float* factors, const float* combine) {
  const Shape& shape = layout_->shape;
  layout_->blocks[b] = {matrix_of(factors, shape.rank, shape.d), panels_of(combine, shape.Q, shape.rank)};
}

void Task::set_weights(const float* weights) {
  layout_->weights.assign(weights, weights + layout_->shape.Q);
  layout_->weights.resize(layout_->padded_queries());
}

namespace {

template <typename Layout>
class MixedScan : public Scan {
 public:
  MixedScan(const Layout& task, const float* squared_norms, const Rows& rows, const TopK& top, bool* doubtful)
      : Scan(rows, top, task.padded_queries()),
        task_(task),
        squared_norms_(squared_norms),
        doubtful_(doubtful),
        padded_rank_(task.padded_rank()),
        products_(kTileRows * padded_rank_) {}

 private:
  void score(size_t row, size_t count) override {
    double squares[kTileRows] = {};
    const size_t L = task_.blocks.size(), rank = task_.shape.rank;
    for (size_t b = 0; b < L; ++b) {
      const Matrix& factors = task_.blocks[b].factors;
      std::fill(products_.begin(), products_.end(), 0.0f);
      reader_.multiply(row, count, b, factors, 0, factors.panels.size(), 0, products_.data(), padded_rank_);
      combine(count, task_.blocks[b].combine);
      for (size_t r = 0; r < count; ++r) {
        squares[r] += kernels().sum_of_squares(products_.data() + r * padded_rank_, rank);
      }
    }
    for (size_t r = 0; r < count; ++r) {
      const float* norms = squared_norms_ + (row + r) * L;
      double whole = 0;
      for (size_t b = 0; b < L; ++b) whole += norms[b];
      double norm = task_.shape.base * whole + task_.shape.sign * squares[r];
      doubtful_[row + r] = norm < task_.shape.trusted * whole;
      auto factor = static_cast<float>(whole == 0 ? 0.0 : 1 / std::sqrt(norm));
      for (size_t q = 0; q < width_; ++q) scores_[r * width_ + q] *= factor * task_.weights[q];
    }
  }

  bool valid(size_t row) const override { return !doubtful_[row]; }

  // scores_ += products_ times the matrix.
  void combine(size_t count, const Matrix& matrix) {
    const Panel *begin = matrix.panels.data(), *end = begin + matrix.panels.size();
    const int block_rows = begin->kernel->rows;
    for (size_t i = 0; i < matrix.length; i += kDepth) {
      size_t depth = std::min(kDepth, matrix.length - i);
      for (size_t first = 0; first < count; first += block_rows) {
        Block block;
        for (int r = 0; r < block_rows; ++r) {
          block.rows[r] = products_.data() + std::min(first + r, count - 1) * padded_rank_ + i;
          block.ahead[r] = reinterpret_cast<const char*>(block.rows[r]);
          block.scale[r] = 1;
        }
        multiply_panels(block, begin, end, i, depth, scores_.data() + first * width_, width_);
      }
    }
  }

  const Layout& task_;
  const float* squared_norms_;
  bool* doubtful_;
  size_t padded_rank_;
  Floats products_;  // (row of the tile, padded rank): t of one block
};

// ---- All threads
// -------------------------------------------------------------------------------------------

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// All memory is taken before the threads start, where running out of it is an ordinary exception.
template <typename MakeScan>
void select(size_t N, const TopK& top, int threads, MakeScan make_scan) {
  const auto tiles = static_cast<ptrdiff_t>((N + kTileRows - 1) / kTileRows);
  threads = static_cast<int>(std::min<ptrdiff_t>(threads, tiles));
  std::vector<std::unique_ptr<Scan>> scans(threads);
  std::vector<std::vector<Candidate>> merged(threads);
  for (int t = 0; t < threads; ++t) {
    scans[t] = make_scan();
    merged[t].reserve(std::min(threads * Reservoir::capacity(top.k), N));
  }

#pragma omp parallel for num_threads(threads) schedule(monotonic : dynamic)
  for (ptrdiff_t tile = 0; tile < tiles; ++tile) {
    size_t row = tile * kTileRows;
    scans[thread_index()]->run(row, std::min(kTileRows, N - row));
  }

  const int mergers = static_cast<int>(std::min<size_t>(threads, top.Q));
#pragma omp parallel for num_threads(mergers)
  for (ptrdiff_t q = 0; q < static_cast<ptrdiff_t>(top.Q); ++q) {
    auto& best = merged[thread_index()];
    best.clear();
    for (const auto& scan : scans) {
      best.insert(best.end(), scan->candidates(q).begin(), scan->candidates(q).end());
    }
    size_t found = std::min(top.k, best.size());
    std::partial_sort(best.begin(), best.begin() + static_cast<ptrdiff_t>(found), best.end(), better);
    for (size_t i = 0; i < found; ++i) {
      top.scores[q * top.k + i] = top.largest ? best[i].score : 0.0f - best[i].score;  // no minus zero
      top.positions[q * top.k + i] = best[i].position;
    }
  }
}

}  // namespace

void score_topk(const float* queries, const Rows& rows, const TopK& top, int threads) {
  if (is_coded(rows.type)) return coded_topk(queries, rows, top, threads);
  const Matrix matrix = matrix_of(queries, top.Q, rows.L * rows.d);
  select(rows.N, top, threads, [&] { return std::make_unique<ScoreScan>(matrix, rows, top); });
}

void mixed_topk(const Task& task, const float* squared_norms, const Rows& rows, const TopK& top,
                bool* doubtful, int threads) {
  using Scan = MixedScan<Task::Layout>;
  select(rows.N, top, threads,
         [&] { return std::make_unique<Scan>(*task.layout_, squared_norms, rows, top, doubtful); });
}

}  // namespace trackstar
