// Memory and layouts that the forms of project_gradients share.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace trackstar {

inline int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

inline int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// The memory of one thread's calls, which is kept from call to call: faulting in fresh pages would cost up to a
// fifth of a call. It grows to the largest need of each block.
class Scratch {
 public:
  static Scratch& of_this_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }

  // Everything taken so far may be overwritten.
  void rewind() { taken_ = 0; }

  float* take(int64_t size) {
    if (taken_ == blocks_.size()) blocks_.push_back({0, {nullptr, std::free}});
    Block& block = blocks_[taken_++];
    if (block.size < size) {
      block = {0, {nullptr, std::free}};
      const int64_t bytes = round_up(size * sizeof(float), kLine);
      block.memory.reset(static_cast<float*>(std::aligned_alloc(kLine, bytes)));
      if (!block.memory) throw std::bad_alloc();
      block.size = size;
    }
    return block.memory.get();
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Block {
    int64_t size;
    std::unique_ptr<float, decltype(&std::free)> memory;
  };
  std::vector<Block> blocks_;
  size_t taken_ = 0;
};

// Uninitialised floats on a cache line boundary, for the length of a call.
class Buffer {
 public:
  explicit Buffer(int64_t size) : memory_(Scratch::of_this_thread().take(size)) {}
  float* at(int64_t index) const { return memory_ + index; }

 private:
  float* memory_;
};

inline std::vector<Buffer> one_per_thread(int threads, int64_t size) {
  std::vector<Buffer> buffers;
  for (int i = 0; i < threads; ++i) buffers.emplace_back(size);
  return buffers;
}

// One panel, `width` wide, out of the rows of a row-major matrix: panel[t * width + i] = from[i, t], zeros
// after `rows`.
inline void pack_transposed(const float* from, int64_t rows, int64_t depth, int64_t width, float* panel) {
  for (int64_t t = 0; t < depth; ++t) {
    for (int64_t i = 0; i < std::min(rows, width); ++i) panel[t * width + i] = from[i * depth + t];
    for (int64_t i = rows; i < width; ++i) panel[t * width + i] = 0.0f;
  }
}

// The sketches (rank, rows, depth) as panels, each r padded to whole panels.
inline Buffer pack_sketches(const float* sketches, int64_t rank, int64_t rows, int64_t depth, int64_t width,
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

}  // namespace trackstar
