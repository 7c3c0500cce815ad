// The kernels of scoring.h. A block has one group of columns and a slice of the rows; blocks of the same rows and
// other columns follow each other, so that rows come from memory once.
#pragma once

#include "cuda/device.cuh"
#include "cuda/scoring.h"
#include "cuda/survivors.cuh"
#include "cuda/tile.cuh"

namespace trackstar::cuda {

template <RowType type, int kColumns>
struct Shared {
  Stage<type, kColumns> stages[kStages<type, kColumns>];
  Thresholds<kColumns> thresholds;
};
constexpr size_t kMostShared = 99 * 1024;  // of the smallest part

// Where a block is on its way: through the tiles of its slice, for each through the rows' blocks, for each through
// `parts` of a matrix, for each through `steps`.
struct Walk {
  int tiles, slices, blocks, parts, steps;

  struct Place {
    int tile, block, part, step;
  };

  __device__ Place begin() const { return {static_cast<int>(blockIdx.y), 0, 0, 0}; }
  __device__ bool ended(const Place& at) const { return at.tile >= tiles; }
  __device__ void advance(Place& at) const {
    if (++at.step < steps) return;
    at.step = 0;
    if (++at.part < parts) return;
    at.part = 0;
    if (++at.block < blocks) return;
    at.block = 0;
    at.tile += slices;
  }
  __device__ bool ends_tile(const Place& at) const {
    return at.step == steps - 1 && at.part == parts - 1 && at.block == blocks - 1;
  }
};

// Calls copy(stage, place) for each place, several places ahead of use(stage, place).
template <RowType type, int kColumns, typename Copy, typename Use>
__device__ void walk(const Walk& way, Stage<type, kColumns>* stage, Copy copy, Use use) {
  constexpr int kDepth = kStages<type, kColumns>;
  Walk::Place ahead = way.begin();
  const auto copy_next = [&](int into) {
    if (!way.ended(ahead)) {
      copy(stage[into], ahead);
      way.advance(ahead);
    }
    commit_copies();
  };
  for (int i = 0; i < kDepth - 1; ++i) copy_next(i);
  int current = 0;
  for (Walk::Place at = way.begin(); !way.ended(at); way.advance(at)) {
    wait_for_copies<kDepth - 2>();
    __syncthreads();  // every thread's copies of this step are there, and the step before it has been used
    copy_next(current == 0 ? kDepth - 1 : current - 1);
    use(stage[current], at);
    current = current == kDepth - 1 ? 0 : current + 1;
  }
}

__device__ inline int steps_of(int d, int depth) { return (d + depth - 1) / depth; }
__device__ inline int tiles_of(size_t N) { return static_cast<int>((N + kTileRows - 1) / kTileRows); }

// Row lane / 4 + 8·h of the warp's, in a tile.
__device__ inline uint32_t row_of(int tile, int h) {
  return static_cast<uint32_t>(tile) * kTileRows + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h;
}

__device__ inline float scale_of(const Rows& rows, uint32_t n, int block) {
  return rows.scales == nullptr || n >= rows.N ? 1.0f : rows.scales[static_cast<size_t>(n) * rows.L + block];
}

template <RowType type, int kColumns>
__device__ void copy_rows_at(Stage<type, kColumns>& stage, const Rows& rows, bool aligned,
                             const Walk::Place& at) {
  const int begin = at.step * Format<type>::kDepth;
  copy_rows(stage, rows, aligned, static_cast<size_t>(at.tile) * kTileRows,
            static_cast<size_t>(at.block) * rows.d + begin, rows.d - begin);
}

// sum += addend · factor[h], row by row.
template <int kColumns>
__device__ void add(Sums<kColumns>& sum, const Sums<kColumns>& addend, const float (&factor)[2]) {
#pragma unroll
  for (int c = 0; c < kColumns / 8; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[c][i] += factor[i / 2] * addend[c][i];
  }
}

template <int kColumns>
__device__ void clear(Sums<kColumns>& sum) {
#pragma unroll
  for (int c = 0; c < kColumns / 8; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[c][i] = 0;
  }
}

// ---- score_topk --------------------------------------------------------------------------------------------

// A score by its definition, for numbers that tensor cores cannot split.
template <RowType type>
__device__ float plain_score(const Rows& rows, const float* query, uint32_t n) {
  const auto* row = static_cast<const typename Format<type>::Number*>(rows.values) +
                    static_cast<ptrdiff_t>(n) * rows.stride;
  float score = 0;
  for (int b = 0; b < rows.L; ++b) {
    float sum = 0;
    for (int j = 0; j < rows.d; ++j) {
      const size_t i = static_cast<size_t>(b) * rows.d + j;
      sum += number<type>(row[i]) * query[i];
    }
    score += scale_of(rows, n, b) * sum;
  }
  return score;
}

// Blocks that an SM can hold, where registers would be too few otherwise.
template <RowType type, int kColumns>
constexpr int kResident = kColumns == 16 || type == RowType::float16 || type == RowType::int8 ? 2 : 1;

template <RowType type, int kColumns>
__global__ void __launch_bounds__(kThreads, kResident<type, kColumns>)
    score_kernel(Rows rows, bool aligned, const float* queries, const unsigned char* operand,
                 const float* query_scales, Survivors survivors) {
  using Tile = Stage<type, kColumns>;
  static_assert(sizeof(Shared<type, kColumns>) <= kMostShared);
  auto& shared = *reinterpret_cast<Shared<type, kColumns>*>(shared_memory());
  const int first = blockIdx.x * kColumns;
  const Walk way{tiles_of(rows.N), survivors.slices, rows.L, 1, steps_of(rows.d, Format<type>::kDepth)};
  Selection<kColumns> selection(shared.thresholds, survivors, first, blockIdx.y);
  Sums<kColumns> scores = {};

  const auto copy = [&](Tile& stage, const Walk::Place& at) {
    copy_rows_at(stage, rows, aligned, at);
    const size_t step = (static_cast<size_t>(blockIdx.x) * way.blocks + at.block) * way.steps + at.step;
    copy_operand(stage, operand + step * Tile::kOperandBytes, Tile::kOperandBytes);
  };
  const auto use = [&](Tile& stage, const Walk::Place& at) {
    const uint32_t row[2] = {row_of(at.tile, 0), row_of(at.tile, 1)};
    const float scale[2] = {scale_of(rows, row[0], at.block), scale_of(rows, row[1], at.block)};
    Sums<kColumns> sum = {};
    multiply(stage, sum);
    add<kColumns>(scores, sum, scale);
    if (!way.ends_tile(at)) return;

    const bool valid[2] = {row[0] < rows.N, row[1] < rows.N};
    uint32_t broken = 0;  // which of the lane's scores are NaN
#pragma unroll
    for (int c = 0; c < kColumns / 8; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int q = first + column_of(c, i);
        if (q >= survivors.Q) continue;
        scores[c][i] *= query_scales[q];
        if (isnan(scores[c][i]) && valid[i / 2]) broken |= 1u << (4 * c + i);
      }
    }
    for (; broken != 0; broken &= broken - 1) {
      const int which = __ffs(broken) - 1, q = first + column_of(which / 4, which % 4);
      const float* query = queries + static_cast<size_t>(q) * rows.L * rows.d;
      const float score = plain_score<type>(rows, query, row_of(at.tile, which % 4 / 2));
#pragma unroll
      for (int c = 0; c < kColumns / 8; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[c][i] = which == 4 * c + i ? score : scores[c][i];
      }
    }
    selection.offer(scores, row, valid);
    clear<kColumns>(scores);
  };
  walk(way, shared.stages, copy, use);
  selection.finish();
}

// ---- mixed_topk --------------------------------------------------------------------------------------------

// Adds up the four lanes that have the same rows.
__device__ inline double sum_of_four(double x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Σ_b squared_norms[n, b] over the lane's share of blocks.
__device__ inline double share_of_norm(const Mixing& mixing, const Rows& rows, uint32_t n) {
  double sum = 0;
  if (n < rows.N) {
    for (int b = threadIdx.x % 4; b < rows.L; b += 4)
      sum += mixing.squared_norms[static_cast<size_t>(n) * rows.L + b];
  }
  return sum;
}

// For each block of a tile's rows, and each part of the factors: t in as many steps as the block has, then the
// products with t, 32 of its numbers a step. t goes from the sums of one product into the other as it is.
template <RowType type, int kColumns>
__global__ void __launch_bounds__(kThreads, kColumns == 64 ? 1 : 2)
    mixed_kernel(Rows rows, bool aligned, Mixing mixing, Survivors survivors) {
  using Tile = Stage<type, kColumns>;
  constexpr int kCombineSteps = (kColumns + 31) / 32;
  auto& shared = *reinterpret_cast<Shared<type, kColumns>*>(shared_memory());
  const int parts = (mixing.rank + kColumns - 1) / kColumns, steps = steps_of(rows.d, Format<type>::kDepth);
  const Walk way{tiles_of(rows.N), survivors.slices, rows.L, parts, steps + kCombineSteps};
  Selection<kColumns> selection(shared.thresholds, survivors, blockIdx.x * kColumns, blockIdx.y);
  Sums<kColumns> scores = {}, t = {};
  double squares[2] = {};

  const auto copy = [&](Tile& stage, const Walk::Place& at) {
    const size_t block = at.block, part = at.part;
    if (at.step < steps) {
      copy_rows_at(stage, rows, aligned, at);
      const size_t step = (part * way.blocks + block) * steps + at.step;
      const auto* factors = static_cast<const unsigned char*>(mixing.factors);
      copy_operand(stage, factors + step * Tile::kOperandBytes, Tile::kOperandBytes);
    } else {
      const size_t step =
          ((blockIdx.x * static_cast<size_t>(way.blocks) + block) * parts + part) * kCombineSteps;
      const auto* combine = static_cast<const unsigned char*>(mixing.combine);
      copy_operand(stage, combine + (step + at.step - steps) * Tile::kCombineBytes, Tile::kCombineBytes);
    }
  };
  const auto use = [&](Tile& stage, const Walk::Place& at) {
    const uint32_t row[2] = {row_of(at.tile, 0), row_of(at.tile, 1)};
    if (at.step < steps) {
      const float factor = mixing.factor_scales[at.block];
      const float scale[2] = {factor * scale_of(rows, row[0], at.block),
                              factor * scale_of(rows, row[1], at.block)};
      Sums<kColumns> sum = {};
      multiply(stage, sum);
      add<kColumns>(t, sum, scale);
      return;
    }
    Sums<kColumns> sum = {};
#pragma unroll
    for (int step = 0; step < kCombineSteps; ++step) {
      if (at.step == steps + step) multiply_sums<type, kColumns>(stage, t, step, sum);
    }
    add<kColumns>(scores, sum, {1, 1});
    if (at.step < steps + kCombineSteps - 1) return;

    float square[2] = {};
#pragma unroll
    for (int c = 0; c < kColumns / 8; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) square[i / 2] += t[c][i] * t[c][i];
    }
    squares[0] += square[0];
    squares[1] += square[1];
    clear<kColumns>(t);
    if (!way.ends_tile(at)) return;

    bool valid[2];
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const double whole = sum_of_four(share_of_norm(mixing, rows, row[h]));
      const double norm = mixing.base * whole + mixing.sign * sum_of_four(squares[h]);
      const bool doubtful = norm < mixing.trusted * whole;
      valid[h] = row[h] < rows.N && !doubtful;
      factor[h] = static_cast<float>(whole == 0 ? 0.0 : 1 / sqrt(norm));
      if (row[h] < rows.N && blockIdx.x == 0 && threadIdx.x % 4 == 0) mixing.doubtful[row[h]] = doubtful;
      squares[h] = 0;
    }
#pragma unroll
    for (int c = 0; c < kColumns / 8; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[c][i] *= factor[i / 2];
    }
    selection.offer(scores, row, valid);
    clear<kColumns>(scores);
  };
  walk(way, shared.stages, copy, use);
  selection.finish();
}

}  // namespace trackstar::cuda
