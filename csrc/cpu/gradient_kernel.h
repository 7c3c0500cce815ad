// The micro-kernels behind project_gradients, one set per instruction set level.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace trackstar {

// The tiles of a product A · B, kernels.rows × kernels.columns each; m and n are rounded up to whole tiles.
//
// Every element of A · B is one chain of multiply-adds from zero over ascending k, so it depends on its row
// of A and its column of B alone: not on its place in the tile, on m or on n. Long sums are cut by the
// caller, which keeps the chains short and the rounding error with them.
struct Tiles {
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
};

// scale[i, j] at at[i * row + j], read inside (m, n) only; or at is null.
struct Scale {
  const float* at;
  ptrdiff_t row;
};

// C (+)= A · B, then optionally C *= scale, element by element.
struct Product {
  Tiles tiles;

  // C[i, j] at at[j / columns * panel + i * row + j % columns].
  struct C {
    float* at;
    ptrdiff_t panel, row;
  } c;
  bool accumulate;
  Scale scale;
};

// Which row of a CountSketch every row of A · B is added to, and with what factor.
struct Bucket {
  int32_t row;
  float value;
};

// For every r, sums[r, bucket[r, i].row, j] += bucket[r, i].value · (A · B ∘ scale)[i, j], over ascending i. scale
// is not null.
struct BucketSums {
  Tiles tiles;
  Scale scale;
  ptrdiff_t rank;
  const Bucket* buckets;  // [r, i] at buckets[r * bucket_rank + i], defined up to whole tiles
  ptrdiff_t bucket_rank;

  // sums[r, q, j] at at[r * rank + q * row + j].
  struct Sums {
    float* at;
    ptrdiff_t rank, row;
  } sums;
};

// C[t, r · rows + bucket[r, i].row] = Σ_i bucket[r, i].value · from[t, i], C laid out as in Product: rows of a
// matrix sketched by buckets. Every sum is one chain of multiply-adds from zero over ascending i.
struct BucketSketch {
  const void* from;  // numbers of an Element
  ptrdiff_t row, depth, width;
  ptrdiff_t rank, rows;
  const Bucket* buckets;
  ptrdiff_t bucket_rank;
  Product::C c;
  float* scratch;  // rank · rows vectors: kMaxLanes numbers each
};

// C[i, j] (+)= Σ_t from[i, t] · sketches[j, t], C laid out as in Product: rows of a matrix times dense rows. Every
// sum is one chain of multiply-adds for each lane of a vector, over ascending t, and the lanes are added last.
struct Dots {
  const void* from;  // m rows of numbers of an Element
  ptrdiff_t row, m;
  const float* sketches;  // n rows
  ptrdiff_t sketch_row, n;
  ptrdiff_t k;
  Product::C c;
  bool accumulate;
};

constexpr ptrdiff_t kMaxPackWidth = 192;
constexpr ptrdiff_t kMaxLanes = 16;

// What depends on the Element (csrc/gradient.h) of a row-major matrix. Numbers are widened as they are read; or,
// where the machine multiplies pairs of them, panels hold pairs.
struct ElementKernels {
  // Copies `width` ≤ kMaxPackWidth columns of `depth` rows, `row` numbers apart, into panels of A, number t of
  // column i to panels[i / rows * panel + t / terms * rows + i % rows], or of B likewise. The last panel and
  // the last pair are filled up with zeros.
  using Pack = void(const void* from, ptrdiff_t row, ptrdiff_t depth, ptrdiff_t width, float* panels,
                    ptrdiff_t panel);
  Pack *pack_a, *pack_b;

  // Products of such panels, with k counted in steps of `terms` numbers. A.row = 1.
  ptrdiff_t terms;  // 1 or 2
  void (*multiply)(const Product& product);
  void (*add_to_buckets)(const BucketSums& sums);

  void (*dots)(const Dots& dots);
  void (*sketch)(const BucketSketch& sketch);
};

struct GradientKernels {
  ptrdiff_t rows, columns;  // of a tile

  void (*multiply)(const Product& product);  // of floats
  ElementKernels of_element[3];
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
namespace v4_bf16 {
extern const GradientKernels gradient_kernels;
}

}  // namespace trackstar
