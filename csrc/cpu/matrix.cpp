#include "cpu/matrix.h"

#include <algorithm>
#include <utility>

#include "cpu/isa.h"
#include "cpu/round_up.h"

namespace trackstar {

bool are_few(size_t count, RowType rows) {
  // Eight queries on float32 rows took 0.62 of torch.mm's time in panels and 0.46–0.50 without on Zen 3 and Zen 4, but 0.36
  // and 0.62 on Zen 5, where two take 0.8 of the time in panels. On Ice Lake eight take 0.7, four as long, two 1.07.
  // Float16 rows would have to be widened for them, which takes longer than it saves.
  if (rows != RowType::float32 || isa() < Isa::v4) return count <= kMaxDotQueries;
  return count <= (is_zen5() ? 1 : is_intel() ? 4 : kMaxDotQueries);
}

Matrix::Matrix(RowType rows, size_t count, size_t L, size_t d)
    : Matrix(count, L, d, round_up(d, scoring_kernels().group)) {
  if (!are_few(count, rows)) return;
  spacing_ = d;
  panels_.clear();
  interleaved_.resize(L * d * count);
}

Matrix::Matrix(size_t count, size_t L, size_t d, size_t spacing)
    : count_(count), d_(d), spacing_(spacing), kernels_(&scoring_kernels()) {
  const auto &narrow = kernels_->narrow, &wide = kernels_->wide;
  for (size_t first = 0; first < count; first += panels_.back().kernel->queries) {
    const PanelKernel& kernel = count - first <= static_cast<size_t>(narrow.queries) ? narrow : wide;
    panels_.push_back({&kernel, first, Aligned<float>(L * spacing * kernel.queries)});
  }
}

void Matrix::set_block(size_t b, const float* vectors, size_t stride) {
  const size_t group = kernels_->group, lanes = kernels_->lanes;
  constexpr size_t kStretch =
      256;  // of a vector, copied before the next vector's: few enough lines to stay in cache
  for (Panel& panel : panels_) {
    const size_t width = panel.kernel->queries, last = std::min(panel.first + width, count_);
    float* values = panel.values.data() + b * spacing_ * width;
    for (size_t begin = 0; begin < d_; begin += kStretch) {
      const size_t end = std::min(begin + kStretch, d_);
      for (size_t v = panel.first; v < last; ++v) {
        const float* from = vectors + v * stride;
        float* to = values + begin * width + (v - panel.first) * group;
        for (size_t i = begin; i < end; i += group, to += width * group) {
          for (size_t j = 0; j < group && i + j < end; ++j) to[j] = from[i + j];
        }
      }
    }
  }
  if (!panels_.empty()) return;
  float* to = interleaved_.data() + b * spacing_ * count_;
  for (size_t i = 0; i < d_; i += lanes) {
    for (size_t v = 0; v < count_; ++v) {
      to = std::copy_n(vectors + v * stride + i, std::min(lanes, d_ - i), to);
    }
  }
}

size_t Matrix::width() const {
  return panels_.empty() ? count_
                         : panels_.back().first + static_cast<size_t>(panels_.back().kernel->queries);
}

size_t Matrix::block_rows() const {
  return panels_.empty() ? kernels_->single.dot[count_ - 1].rows : panels_.front().kernel->rows;
}

size_t Matrix::bytes() const {
  size_t floats = interleaved_.size();
  for (const Panel& panel : panels_) floats += panel.values.size();
  return floats * sizeof(float);
}

}  // namespace trackstar
