#include "cpu/gradient_kernel.h"

#include "cpu/simd.h"

namespace trackstar::TRACKSTAR_ISA {
namespace {

// A tile fills the register file: 12 or 24 accumulators, and room for a row of B and one element of A.
#if defined(__AVX512F__)
constexpr ptrdiff_t kRows = 24, kVectors = 1;
#else
constexpr ptrdiff_t kRows = 6, kVectors = 2;
#endif
constexpr ptrdiff_t kColumns = kVectors * kLanes;

// One tile of C; a, b and c point at its own panels and corner, scale at a whole tile or nowhere. Panels of A
// with a row stride of 1 have a version of their own: addresses that need no registers.
template <bool kPacked>
__attribute__((noinline)) void multiply_tile(const Product& product, const float* a, const float* b, float* c,
                                             const float* scale, ptrdiff_t scale_row) {
  const ptrdiff_t a_row = kPacked ? 1 : product.a.row, a_column = product.a.column, c_row = product.c.row;
  if (scale) {  // its rows are far apart, which no hardware foresees
    for (ptrdiff_t i = 0; i < kRows; ++i) __builtin_prefetch(scale + i * scale_row);
  }
  Vec sum[kRows][kVectors] = {};
  for (ptrdiff_t t = 0; t < product.k; ++t, a += a_column, b += kColumns) {
    Vec row[kVectors];
#pragma GCC unroll 2
    for (ptrdiff_t v = 0; v < kVectors; ++v) {
      row[v] = load(b + v * kLanes);
      hold(row[v]);
    }
#pragma GCC unroll 24
    for (ptrdiff_t i = 0; i < kRows; ++i) {
      const Vec element = splat(a[i * a_row]);
#pragma GCC unroll 2
      for (ptrdiff_t v = 0; v < kVectors; ++v) sum[i][v] += element * row[v];
    }
  }
#pragma GCC unroll 24
  for (ptrdiff_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (ptrdiff_t v = 0; v < kVectors; ++v) {
      if (product.accumulate) sum[i][v] += load(c + i * c_row + v * kLanes);
      if (scale) sum[i][v] *= load(scale + i * scale_row + v * kLanes);
      store(c + i * c_row + v * kLanes, sum[i][v]);
    }
  }
}

void multiply(const Product& product) {
  const auto& [m, n, k, a, b, c, accumulate, scale] = product;
  const auto tile = a.row == 1 ? multiply_tile<true> : multiply_tile<false>;
  for (ptrdiff_t j = 0; j < n; j += kColumns) {
    const float* b_tile = b.at + j / kColumns * b.panel;
    for (ptrdiff_t i = 0; i < m; i += kRows) {
      const float* a_tile = a.at + i / kRows * a.panel;
      float* c_tile = c.at + j / kColumns * c.panel + i * c.row;
      const float* scale_tile = scale.at ? scale.at + i * scale.row + j : nullptr;
      if (scale_tile && (i + kRows > m || j + kColumns > n)) {
        float copy[kRows * kColumns] = {};
        for (ptrdiff_t y = 0; y < kRows && i + y < m; ++y) {
          for (ptrdiff_t x = 0; x < kColumns && j + x < n; ++x)
            copy[y * kColumns + x] = scale_tile[y * scale.row + x];
        }
        tile(product, a_tile, b_tile, c_tile, copy, kColumns);
      } else {
        tile(product, a_tile, b_tile, c_tile, scale_tile, scale.row);
      }
    }
  }
}

template <ptrdiff_t kWidth>
void pack(const float* from, ptrdiff_t row, ptrdiff_t depth, ptrdiff_t width, float* panels,
          ptrdiff_t panel) {
  constexpr ptrdiff_t kAhead = 8;
  const ptrdiff_t whole = width / kWidth * kWidth;
  for (ptrdiff_t t = 0; t < depth; ++t, from += row, panels += kWidth) {
    const ptrdiff_t ahead = t + kAhead < depth ? kAhead * row : 0;
    float* to = panels;
    for (ptrdiff_t j = 0; j < whole; j += kWidth, to += panel) {
      __builtin_prefetch(from + ahead + j);
      __builtin_memcpy(to, from + j, kWidth * sizeof(float));
    }
    if (whole == width) continue;
    for (ptrdiff_t i = 0; i < kWidth; ++i) to[i] = whole + i < width ? from[whole + i] : 0.0f;
  }
}

}  // namespace

const GradientKernels gradient_kernels = {kRows, kColumns, multiply, pack<kRows>, pack<kColumns>};

}  // namespace trackstar::TRACKSTAR_ISA
