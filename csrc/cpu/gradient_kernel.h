// The micro-kernels behind project_gradients, one set per instruction set level.
#pragma once

#include <stddef.h>

namespace trackstar {

// C (+)= A · B, then optionally C *= scale, element by element. C is made of tiles of kernels.rows ×
// kernels.columns, and m and n are rounded up to whole tiles.
//
// Every element of A · B is one chain of multiply-adds from zero over ascending k, so it depends on its row
// of A and its column of B alone: not on its place in the tile, on m or on n. Long sums are cut by the
// caller, which keeps the chains short and the rounding error with them.
struct Product {
  ptrdiff_t m, n, k;

  // A[i, t] at at[i / rows * panel + i % rows * row + t * column].
  struct A {
    const float* at;
    ptrdiff_t panel, row, column;
  } a;

  // B[t, j] at at[j / columns * panel + t * columns + j % columns].
  struct B {
    const float* at;
    ptrdiff_t panel;
  } b;

  // C[i, j] at at[j / columns * panel + i * row + j % columns].
  struct C {
    float* at;
    ptrdiff_t panel, row;
  } c;
  bool accumulate;

  // scale[i, j] at at[i * row + j], read inside (m, n) only; or at is null.
  struct Scale {
    const float* at;
    ptrdiff_t row;
  } scale;
};

struct GradientKernels {
  ptrdiff_t rows, columns;  // of a tile

  void (*multiply)(const Product& product);

  // Copies `width` columns of a row-major matrix of `depth` rows into panels of A, column i to
  // panels[i / rows * panel + t * rows + i % rows], or of B likewise; the last panel is filled up with zeros.
  void (*pack_a)(const float* from, ptrdiff_t row, ptrdiff_t depth, ptrdiff_t width, float* panels,
                 ptrdiff_t panel);
  void (*pack_b)(const float* from, ptrdiff_t row, ptrdiff_t depth, ptrdiff_t width, float* panels,
                 ptrdiff_t panel);
};

namespace baseline {
extern const GradientKernels gradient_kernels;
}
namespace v3 {
extern const GradientKernels gradient_kernels;
}
namespace v4 {
extern const GradientKernels gradient_kernels;
}

}  // namespace trackstar
