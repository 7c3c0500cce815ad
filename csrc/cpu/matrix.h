// What a scan multiplies rows with, in the layouts of the micro-kernels.
#pragma once

#include <cstddef>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/scoring_kernel.h"
#include "scoring.h"

namespace trackstar {

// Whether vectors that rows of a type are multiplied with are too few to be worth panels.
bool are_few(size_t count, RowType rows);

// `count` vectors (L, d): interleaved, as the dot kernels take a few, or in panels.
class Matrix {
 public:
  // Whichever suits so many of them and rows of a type.
  Matrix(RowType rows, size_t count, size_t L, size_t d);
  // In panels, with blocks `spacing` apart, at least d; what is between is zeros.
  Matrix(size_t count, size_t L, size_t d, size_t spacing);

  // Copies block b of all vectors, dense and `stride` from one to the next.
  void set_block(size_t b, const float* vectors, size_t stride);

  // Vectors `first` and on, as many as the kernel multiplies; those that are not there are zeros.
  struct Panel {
    const PanelKernel* kernel;
    size_t first;
    Aligned<float> values;
  };
  const std::vector<Panel>& panels() const { return panels_; }  // none if interleaved

  size_t count() const { return count_; }
  // Columns of a product, padding included.
  size_t width() const;
  // Rows that a kernel takes at once.
  size_t block_rows() const;
  size_t bytes() const;

  // Where number i of block b begins, for a kernel.
  const float* panel_at(const Panel& panel, size_t b, size_t i) const {
    return panel.values.data() + (b * spacing_ + i) * panel.kernel->queries;
  }
  const float* interleaved_at(size_t b, size_t i) const {
    return interleaved_.data() + (b * spacing_ + i) * count_;
  }

 private:
  size_t count_, d_, spacing_;
  const ScoringKernels* kernels_;
  Aligned<float> interleaved_;
  std::vector<Panel> panels_;
};

}  // namespace trackstar
