#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/coded.h"
#include "cpu/matrix.h"
#include "cpu/round_up.h"
#include "cpu/row_reader.h"
#include "cpu/scan.h"
#include "scoring.h"

namespace trackstar {

namespace {

// A task as rows of a type are multiplied with it. Blocks are combined in groups, so that one product is deep enough to
// be worth its start even where the rank is small.
struct Form {
  Form(const Task::Shape& shape, RowType rows);

  size_t groups() const { return combine.size(); }
  size_t blocks(size_t group) const { return std::min(group_blocks, factors.size() - group * group_blocks); }

  std::vector<Matrix> factors;  // of each block: `rank` vectors (1, d)
  size_t padded_rank;           // columns of a product with them
  size_t group_blocks;
  std::vector<Matrix> combine;  // of each group: Q vectors (blocks, rank), blocks padded_rank apart
};

Form::Form(const Task::Shape& shape, RowType rows)
    : factors(shape.L, Matrix(rows, shape.rank, 1, shape.d)),
      padded_rank(round_up(factors.front().width(), scoring_kernels().group)),
      group_blocks(std::min(shape.L, std::max<size_t>(1, kChunkDepth / padded_rank))) {
  for (size_t b = 0; b < shape.L; b += group_blocks) {
    combine.emplace_back(shape.Q, std::min(group_blocks, shape.L - b), shape.rank, padded_rank);
  }
}

}  // namespace

struct Task::Layout {
  explicit Layout(const Shape& shape) : shape(shape), forms{Form(shape, RowType::float32)} {
    constexpr RowType kOthers = RowType::float16;
    if (are_few(shape.rank, RowType::float32) != are_few(shape.rank, kOthers))
      forms.emplace_back(shape, kOthers);
  }

  const Form& form(RowType rows) const { return rows == RowType::float32 ? forms.front() : forms.back(); }

  Shape shape;
  std::vector<Form> forms;  // for all rows, or for those of float32 and for others
  Aligned<float> weights;
};

Task::Task(const Shape& shape) : layout_(new Layout(shape)) {}
Task::~Task() = default;

void Task::set_block(size_t b, const float* factors, const float* combine) {
  const Shape& shape = layout_->shape;
  for (Form& form : layout_->forms) {
    form.factors[b].set_block(0, factors, shape.d);
    form.combine[b / form.group_blocks].set_block(b % form.group_blocks, combine, shape.rank);
  }
}

void Task::set_weights(const float* weights) {
  layout_->weights.assign(weights, weights + layout_->shape.Q);
  layout_->weights.resize(layout_->forms.front().combine.front().width());
}

namespace {

// Multiplies rows with a task.
template <typename Layout>
class TaskScan : public Scan {
 protected:
  TaskScan(const Layout& task, const Rows& rows, const std::vector<TopK>& tops, SharedThresholds& shared)
      : TaskScan(task, task.form(rows.type), rows, tops, shared) {}

  TaskScan(const Layout& task, const Form& form, const Rows& rows, const std::vector<TopK>& tops,
           SharedThresholds& shared)
      : Scan(tops, rows.N, form.combine.front().width(), rows_of_tile(form, rows.type), shared),
        task_(task),
        rows_(rows),
        squares_(tile_rows()),
        reader_(rows, tile_rows()),
        form_(form),
        products_(tile_rows() * form.group_blocks * form.padded_rank) {}

  // Adds Σ_b combine · t_b to scores_, and puts Σ_b ‖t_b‖² into squares_.
  void multiply(size_t row, size_t count) {
    reader_.open(row, count);
    std::fill(squares_.begin(), squares_.end(), 0.0);
    for (size_t group = 0; group < form_.groups(); ++group) {
      const size_t blocks = form_.blocks(group), width = blocks * form_.padded_rank;
      std::fill(products_.begin(), products_.end(), 0.0f);
      for (size_t i = 0; i < blocks; ++i) {
        const size_t b = group * form_.group_blocks + i;
        const Matrix& factors = form_.factors[b];
        reader_.multiply(b, factors, 0, 0, factors.panels().size(), products_.data() + i * form_.padded_rank,
                         width);
      }
      combine(count, form_.combine[group], width);
      for (size_t r = 0; r < count; ++r) {
        squares_[r] += kernels_.sum_of_squares(products_.data() + r * width, width);
      }
    }
  }

  const Layout& task_;
  const Rows rows_;
  std::vector<double> squares_;  // of the tile's rows: Σ_b ‖t_b‖²

 private:
  static size_t rows_of_tile(const Form& form, RowType rows) {
    size_t bytes = 0;
    for (const Matrix& matrix : form.factors) bytes += matrix.bytes();
    for (const Matrix& matrix : form.combine) bytes += matrix.bytes();
    const size_t block_rows = form.factors.front().block_rows();
    // One vector reads a row after the other from memory, but codes only once they are floats in cache.
    return block_rows == 1 && !is_coded(rows) ? 1 : trackstar::rows_of_tile(block_rows, bytes);
  }

  // scores_ += products_ (count, width) times the matrix.
  void combine(size_t count, const Matrix& matrix, size_t width) {
    const size_t block_rows = matrix.block_rows();
    for (size_t i = 0; i < width; i += kChunkDepth) {
      const size_t depth = std::min(kChunkDepth, width - i);
      for (size_t first = 0; first < count; first += block_rows) {
        const float* rows[kMaxBlockRows];
        float scales[kMaxBlockRows];
        for (size_t r = 0; r < block_rows; ++r) {
          rows[r] = products_.data() + std::min(first + r, count - 1) * width + i;
          scales[r] = 1;
        }
        for (const Matrix::Panel& panel : matrix.panels()) {
          panel.kernel->run(rows, matrix.panel_at(panel, 0, i), depth, FetchLines{nullptr, 0, false}, scales,
                            scores_.data() + first * width_ + panel.first, width_);
        }
      }
    }
  }

  RowReader reader_;
  const Form& form_;
  Aligned<float> products_;  // (row of the tile, group_blocks, padded_rank): t of a group
};

template <typename Layout>
class MixedScan : public TaskScan<Layout> {
 public:
  MixedScan(const Layout& task, const float* squared_norms, const Rows& rows, const std::vector<TopK>& tops,
            bool* doubtful, SharedThresholds& shared)
      : TaskScan<Layout>(task, rows, tops, shared), squared_norms_(squared_norms), doubtful_(doubtful) {}

 private:
  void score(size_t row, size_t count) override {
    this->multiply(row, count);
    const Task::Shape& shape = this->task_.shape;
    for (size_t r = 0; r < count; ++r) {
      const float* norms = squared_norms_ + (row + r) * shape.L;
      double whole = 0;
      for (size_t b = 0; b < shape.L; ++b) whole += norms[b];
      double norm = shape.base * whole + shape.sign * this->squares_[r];
      if (is_coded(this->rows_.type)) {
        norm += (1 - shape.base) * std::max(0.0, whole - decoded_square(this->rows_, row + r));
      }
      doubtful_[row + r] = norm < shape.trusted * whole;
      const auto factor = static_cast<float>(whole == 0 ? 0.0 : 1 / std::sqrt(norm));
      float* scores = this->scores_.data() + r * this->width_;
      for (size_t q = 0; q < this->width_; ++q) scores[q] *= factor * this->task_.weights[q];
    }
  }

  bool valid(size_t row) const override { return !doubtful_[row]; }

  const float* squared_norms_;
  bool* doubtful_;
};

// Writes what scores are made of.
template <typename Layout>
class PartsScan : public TaskScan<Layout> {
 public:
  PartsScan(const Layout& task, const Rows& rows, const MixedParts& parts, SharedThresholds& shared)
      : TaskScan<Layout>(task, rows, {}, shared), parts_(parts) {}

 private:
  void score(size_t row, size_t count) override {
    this->multiply(row, count);
    const Task::Shape& shape = this->task_.shape;
    for (size_t r = 0; r < count; ++r) {
      const double square = decoded_square(this->rows_, row + r);
      parts_.squares[row + r] = square;
      parts_.inner[row + r] = shape.base * square + shape.sign * this->squares_[r];
      for (size_t q = 0; q < shape.Q; ++q) {
        parts_.numerators[(row + r) * shape.Q + q] =
            this->scores_[r * this->width_ + q] * this->task_.weights[q];
      }
    }
  }

  const MixedParts parts_;
};

}  // namespace

void mixed_topk(const Task& task, const float* squared_norms, const Rows& rows, const std::vector<TopK>& tops,
                bool* doubtful, int threads) {
  using Scan = MixedScan<Task::Layout>;
  SharedThresholds shared(tops, threads);
  run_scans(rows.N, tops, threads, [&] {
    return std::make_unique<Scan>(*task.layout_, squared_norms, rows, tops, doubtful, shared);
  });
}

void mixed_parts(const Task& task, const Rows& rows, const MixedParts& parts, int threads) {
  using Scan = PartsScan<Task::Layout>;
  SharedThresholds shared({}, threads);
  run_scans(rows.N, {}, threads, [&] { return std::make_unique<Scan>(*task.layout_, rows, parts, shared); });
}

}  // namespace trackstar
