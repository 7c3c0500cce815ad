#include "cpu/scoring_kernel.h"

#include "cpu/simd.h"

namespace trackstar {
namespace TRACKSTAR_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kPanelRows = 12;  // two vectors of sums each: 24 of 32 registers
#else
constexpr int kPanelRows = 6;  // 12 of 16 registers
#endif

// ---- Few queries: vectors along the row, so that one query reads rows at the speed of memory --------------

constexpr int dot_rows(int queries) { return 8 / queries; }  // up to 8 sums in flight hide the latency of one

template <int kQueries, typename T>
inline void add_products(const T* const* row, const float* query, size_t query_stride, size_t k,
                         Vec sum[][kQueries]) {
  constexpr int kRows = dot_rows(kQueries);
  Vec values[kQueries];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) values[q] = load(query + q * query_stride + k);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    Vec value = load(row[r] + k);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) sum[r][q] += value * values[q];
  }
}

template <int kQueries, typename T>
__attribute__((noinline)) void dot(const void* const* rows, const float* queries, size_t query_stride,
                                   size_t depth, const float* scale, float* scores, size_t score_stride) {
  constexpr int kRows = dot_rows(kQueries);
  const T* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row[r] = static_cast<const T*>(rows[r]);
  Vec sum[kRows][kQueries] = {};
  size_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) add_products<kQueries>(row, queries, query_stride, k, sum);
  if (k < depth) {
    // The last numbers, padded with zeros to a vector.
    T row_tail[kRows][kLanes] = {};
    float query_tail[kQueries][kLanes] = {};
    for (size_t j = 0; k + j < depth; ++j) {
      for (int r = 0; r < kRows; ++r) row_tail[r][j] = row[r][k + j];
      for (int q = 0; q < kQueries; ++q) query_tail[q][j] = queries[q * query_stride + k + j];
    }
    for (int r = 0; r < kRows; ++r) row[r] = row_tail[r];
    add_products<kQueries>(row, query_tail[0], kLanes, 0, sum);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      float total = 0;
      for (int lane = 0; lane < kLanes; ++lane) total += sum[r][q][lane];
      scores[r * score_stride + q] += scale[r] * total;
    }
  }
}

// ---- Many queries: vectors along the queries, so that rows need no transposition --------------------------

template <int kVecs>
__attribute__((noinline)) void panel(const float* const* rows, const char* const* ahead, const float* panel,
                                     size_t depth, const float* scale, float* scores, size_t score_stride) {
  constexpr int kWidth = kVecs * kLanes;
  constexpr size_t kLine = 16;  // floats of a cache line
  const float* row[kPanelRows];
#pragma GCC unroll 12
  for (int r = 0; r < kPanelRows; ++r) row[r] = rows[r];
  Vec sum[kPanelRows][kVecs] = {};
  for (size_t line = 0; line < depth; line += kLine) {
#pragma GCC unroll 12
    for (int r = 0; r < kPanelRows; ++r) __builtin_prefetch(ahead[r] + 4 * line);
    size_t end = line + kLine < depth ? line + kLine : depth;
    for (size_t k = line; k < end; ++k) {
      Vec query[kVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) query[v] = load(panel + k * kWidth + v * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < kPanelRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) sum[r][v] += row[r][k] * query[v];
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kPanelRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      float* score = scores + r * score_stride + v * kLanes;
      store(score, load(score) + scale[r] * sum[r][v]);
    }
  }
}

void widen_halves(const Half* in, size_t n, float* out) { widen(in, n, out); }

float sum_of_squares(const float* in, size_t n) {
  Vec sum = {};
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(in + i) * load(in + i);
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  for (; i < n; ++i) total += in[i] * in[i];
  return total;
}

template <int kQueries, typename T>
constexpr DotKernel dot_kernel() {
  return {dot_rows(kQueries), dot<kQueries, T>};
}

template <int kVecs>
constexpr PanelKernel panel_kernel() {
  return {kPanelRows, kVecs * kLanes, panel<kVecs>};
}

}  // namespace

const ScoringKernels scoring_kernels = {
    kLanes,
    {dot_kernel<1, float>(), dot_kernel<2, float>(), dot_kernel<3, float>(), dot_kernel<4, float>()},
    {dot_kernel<1, Half>(), dot_kernel<2, Half>(), dot_kernel<3, Half>(), dot_kernel<4, Half>()},
    panel_kernel<1>(),
    panel_kernel<2>(),
    widen_halves,
    sum_of_squares,
};

}  // namespace TRACKSTAR_ISA
}  // namespace trackstar
