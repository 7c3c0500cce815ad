#include "cpu/gradient_kernel.h"

#include <utility>

#include "cpu/simd.h"

namespace trackstar::TRACKSTAR_ISA {
namespace {

// A tile fills the register file: 12 or 24 accumulators, and room for a row of B and one element of A.
#if defined(__AVX512F__)
constexpr ptrdiff_t kRows = 24, kVectors = 1;
#elif defined(__aarch64__)
constexpr ptrdiff_t kRows = 8, kVectors = 3;
#else
constexpr ptrdiff_t kRows = 6, kVectors = 2;
#endif
constexpr ptrdiff_t kColumns = kVectors * kLanes;

typedef Vec Tile[kRows][kVectors];

// What a panel holds, and how two of them are multiplied.
struct Floats {
  static constexpr ptrdiff_t kTerms = 1;
  static Vec broadcast(const float* a) { return splat(*a); }
  static Vec add_product(Vec sum, Vec a, Vec b) { return sum + a * b; }
};

// Two bfloat16 for each float, the first in the lower half.
struct Pairs {
  static constexpr ptrdiff_t kTerms = 2;
  static Vec broadcast(const float* a) {
    typedef uint32_t Word __attribute__((may_alias));
    return (Vec)(*reinterpret_cast<const Word*>(a) - Bits{});
  }
  static Vec add_product(Vec sum, Vec a, Vec b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    const Bits x = (Bits)a, y = (Bits)b, high = Bits{} + 0xFFFF0000;
    return sum + (Vec)(x << 16) * (Vec)(y << 16) + (Vec)(x & high) * (Vec)(y & high);
#endif
  }
};

inline void prefetch(const float* scale,
                     ptrdiff_t row) {  // its rows are far apart, which no hardware foresees
  for (ptrdiff_t i = 0; i < kRows; ++i) __builtin_prefetch(scale + i * row);
}

template <typename Terms>
__attribute__((always_inline)) inline void sum_products(Tile& sum, const float* a, ptrdiff_t a_row,
                                                        ptrdiff_t a_column, const float* b, ptrdiff_t k) {
  for (ptrdiff_t t = 0; t < k; ++t, a += a_column, b += kColumns) {
    Vec row[kVectors];
#pragma GCC unroll 3
    for (ptrdiff_t v = 0; v < kVectors; ++v) {
      row[v] = load(b + v * kLanes);
      hold(row[v]);
    }
#pragma GCC unroll 24
    for (ptrdiff_t i = 0; i < kRows; ++i) {
      const Vec element = Terms::broadcast(a + i * a_row);
#pragma GCC unroll 3
      for (ptrdiff_t v = 0; v < kVectors; ++v) sum[i][v] = Terms::add_product(sum[i][v], element, row[v]);
    }
  }
}

// One tile of C; a, b and c point at its own panels and corner, scale at a whole tile or nowhere. Panels of A
// with a row stride of 1 have a version of their own: addresses that need no registers.
template <typename Terms, bool kPacked>
__attribute__((noinline)) void multiply_tile(const Product& product, const float* a, const float* b, float* c,
                                             const float* scale, ptrdiff_t scale_row) {
  const Tiles& tiles = product.tiles;
  const ptrdiff_t c_row = product.c.row;
  if (scale) prefetch(scale, scale_row);
  Tile sum = {};
  sum_products<Terms>(sum, a, kPacked ? 1 : tiles.a.row, tiles.a.column, b, tiles.k);
#pragma GCC unroll 24
  for (ptrdiff_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
    for (ptrdiff_t v = 0; v < kVectors; ++v) {
      if (product.accumulate) sum[i][v] += load(c + i * c_row + v * kLanes);
      if (scale) sum[i][v] *= load(scale + i * scale_row + v * kLanes);
      store(c + i * c_row + v * kLanes, sum[i][v]);
    }
  }
}

template <typename Terms>
__attribute__((noinline)) void add_tile_to_buckets(const BucketSums& product, const float* a, const float* b,
                                                   const Bucket* buckets, float* sums, const float* scale,
                                                   ptrdiff_t scale_row) {
  prefetch(scale, scale_row);
  Tile sum = {};
  sum_products<Terms>(sum, a, 1, product.tiles.a.column, b, product.tiles.k);
#pragma GCC unroll 24
  for (ptrdiff_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
    for (ptrdiff_t v = 0; v < kVectors; ++v) sum[i][v] *= load(scale + i * scale_row + v * kLanes);
  }
  for (ptrdiff_t r = 0; r < product.rank; ++r, buckets += product.bucket_rank, sums += product.sums.rank) {
#pragma GCC unroll 24
    for (ptrdiff_t i = 0; i < kRows; ++i) {
      float* to = sums + buckets[i].row * product.sums.row;
      const Vec value = splat(buckets[i].value);
#pragma GCC unroll 3
      for (ptrdiff_t v = 0; v < kVectors; ++v, to += kLanes) store(to, load(to) + value * sum[i][v]);
    }
  }
}

// Calls run(i, j, a, b, scale, scale_row) for every tile, with scale at a whole tile or nowhere.
template <typename Run>
inline void for_each_tile(const Tiles& tiles, const Scale& scale, const Run& run) {
  const auto& [m, n, k, a, b] = tiles;
  for (ptrdiff_t j = 0; j < n; j += kColumns) {
    const float* b_tile = b.at + j / kColumns * b.panel;
    for (ptrdiff_t i = 0; i < m; i += kRows) {
      const float* a_tile = a.at + i / kRows * a.panel;
      const float* scale_tile = scale.at ? scale.at + i * scale.row + j : nullptr;
      if (scale_tile && (i + kRows > m || j + kColumns > n)) {
        float copy[kRows * kColumns] = {};
        for (ptrdiff_t y = 0; y < kRows && i + y < m; ++y) {
          for (ptrdiff_t x = 0; x < kColumns && j + x < n; ++x)
            copy[y * kColumns + x] = scale_tile[y * scale.row + x];
        }
        run(i, j, a_tile, b_tile, copy, kColumns);
      } else {
        run(i, j, a_tile, b_tile, scale_tile, scale.row);
      }
    }
  }
}

template <typename Terms>
void multiply(const Product& product) {
  const auto& c = product.c;
  const auto tile = product.tiles.a.row == 1 ? multiply_tile<Terms, true> : multiply_tile<Terms, false>;
  for_each_tile(
      product.tiles, product.scale,
      [&](ptrdiff_t i, ptrdiff_t j, const float* a, const float* b, const float* scale, ptrdiff_t scale_row) {
        tile(product, a, b, c.at + j / kColumns * c.panel + i * c.row, scale, scale_row);
      });
}

template <typename Terms>
void add_to_buckets(const BucketSums& product) {
  for_each_tile(
      product.tiles, product.scale,
      [&](ptrdiff_t i, ptrdiff_t j, const float* a, const float* b, const float* scale, ptrdiff_t scale_row) {
        add_tile_to_buckets<Terms>(product, a, b, product.buckets + i, product.sums.at + j, scale, scale_row);
      });
}

template <ptrdiff_t kWidth>
inline void pack_row(const float* from, ptrdiff_t width, float* panels, ptrdiff_t panel, ptrdiff_t ahead) {
  const ptrdiff_t whole = width / kWidth * kWidth;
  for (ptrdiff_t j = 0; j < whole; j += kWidth, panels += panel) {
    __builtin_prefetch(from + ahead + j);
    __builtin_memcpy(panels, from + j, kWidth * sizeof(float));
  }
  if (whole == width) return;
  for (ptrdiff_t i = 0; i < kWidth; ++i) panels[i] = whole + i < width ? from[whole + i] : 0.0f;
}

template <ptrdiff_t kWidth, typename T>
void pack(const void* matrix, ptrdiff_t row, ptrdiff_t depth, ptrdiff_t width, float* panels,
          ptrdiff_t panel) {
  constexpr ptrdiff_t kAhead = 8;
  const T* from = static_cast<const T*>(matrix);
  for (ptrdiff_t t = 0; t < depth; ++t, from += row, panels += kWidth) {
    if constexpr (sizeof(T) == sizeof(float)) {
      pack_row<kWidth>(from, width, panels, panel, t + kAhead < depth ? kAhead * row : 0);
    } else {
      float wide[kMaxPackWidth];
      widen(from, width, wide);
      pack_row<kWidth>(wide, width, panels, panel, 0);
    }
  }
}

// The first n numbers' bits, and zeros.
inline Bits load_bits(const Bfloat16* from, ptrdiff_t n) {
  if (n >= kLanes) return load_bits(from);
  Bfloat16 tail[kLanes] = {};
  __builtin_memcpy(tail, from, n * sizeof(Bfloat16));
  return load_bits(tail);
}

template <ptrdiff_t kWidth>
void pack_pairs(const void* matrix, ptrdiff_t row, ptrdiff_t depth, ptrdiff_t width, float* panels,
                ptrdiff_t panel) {
  const auto* from = static_cast<const Bfloat16*>(matrix);
  for (ptrdiff_t t = 0; t < depth; t += 2, from += 2 * row, panels += kWidth) {
    float pairs[kMaxPackWidth + kLanes];
    for (ptrdiff_t j = 0; j < width; j += kLanes) {
      const Bits low = load_bits(from + j, width - j);
      const Bits high = t + 1 < depth ? load_bits(from + row + j, width - j) : Bits{};
      store(pairs + j, (Vec)(low | high << 16));
    }
    pack_row<kWidth>(pairs, width, panels, panel, 0);
  }
}

// Swaps bit kBit of the row and the lane of every number.
template <ptrdiff_t kBit, size_t... kLane>
inline void swap_bit(Vec* rows, std::index_sequence<kLane...>) {
  for (ptrdiff_t i = 0; i < kLanes; ++i) {
    if (i & kBit) continue;
    const Vec low = rows[i], high = rows[i | kBit];
    rows[i] = __builtin_shufflevector(low, high, (kLane & kBit ? kLanes + (kLane ^ kBit) : kLane)...);
    rows[i | kBit] = __builtin_shufflevector(low, high, (kLane & kBit ? kLanes + kLane : kLane ^ kBit)...);
  }
}

inline void transpose(Vec* rows) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  swap_bit<1>(rows, lanes);
  swap_bit<2>(rows, lanes);
  if constexpr (kLanes > 4) swap_bit<4>(rows, lanes);
  if constexpr (kLanes > 8) swap_bit<8>(rows, lanes);
}

// Rows of the matrix are the lanes, so that a bucket is a vector.
template <typename T>
void sketch(const BucketSketch& x) {
  for (ptrdiff_t t = 0; t < x.depth; t += kLanes) {
    const ptrdiff_t depth = t + kLanes < x.depth ? kLanes : x.depth - t;
    __builtin_memset(x.scratch, 0, x.rank * x.rows * sizeof(Vec));
    for (ptrdiff_t i = 0; i < x.width; i += kLanes) {
      const ptrdiff_t width = i + kLanes < x.width ? kLanes : x.width - i;
      Vec columns[kLanes];
#pragma GCC unroll 16
      for (ptrdiff_t lane = 0; lane < kLanes; ++lane) {
        const T* from = static_cast<const T*>(x.from) + (t + (lane < depth ? lane : 0)) * x.row + i;
        T tail[kLanes] = {};
        if (width < kLanes) from = static_cast<T*>(__builtin_memcpy(tail, from, width * sizeof(T)));
        columns[lane] = load(from);
      }
      transpose(columns);
      for (ptrdiff_t r = 0; r < x.rank; ++r) {
        const Bucket* buckets = x.buckets + r * x.bucket_rank + i;
        float* sums = x.scratch + r * x.rows * kLanes;
#pragma GCC unroll 16
        for (ptrdiff_t lane = 0; lane < kLanes; ++lane) {
          if (lane == width) break;
          float* to = sums + buckets[lane].row * kLanes;
          store(to, load(to) + splat(buckets[lane].value) * columns[lane]);
        }
      }
    }
    for (ptrdiff_t j = 0; j < x.rank * x.rows; ++j) {
      float* to = x.c.at + j / kColumns * x.c.panel + t * x.c.row + j % kColumns;
      for (ptrdiff_t lane = 0; lane < depth; ++lane) to[lane * x.c.row] = x.scratch[j * kLanes + lane];
    }
  }
}

// A tile of dots fills the register file likewise.
constexpr ptrdiff_t kDotColumns = 4, kDotRows = kRows * kVectors / kDotColumns;

typedef float Quad __attribute__((vector_size(4 * sizeof(float))));

template <typename V, size_t... kLane>
inline auto add_halves(V v, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(v, v, kLane...) +
         __builtin_shufflevector(v, v, (sizeof...(kLane) + kLane)...);
}

// The lanes of each of four vectors, added.
inline Quad lane_sums(const Vec* v) {
  Quad part[kDotColumns];
#pragma GCC unroll 4
  for (ptrdiff_t j = 0; j < kDotColumns; ++j) {
#if defined(__AVX512F__)
    part[j] = add_halves(add_halves(v[j], std::make_index_sequence<8>()), std::make_index_sequence<4>());
#elif defined(__AVX__)
    part[j] = add_halves(v[j], std::make_index_sequence<4>());
#else
    part[j] = v[j];
#endif
  }
  const Quad first = __builtin_shufflevector(part[0], part[1], 0, 4, 1, 5) +
                     __builtin_shufflevector(part[0], part[1], 2, 6, 3, 7);
  const Quad second = __builtin_shufflevector(part[2], part[3], 0, 4, 1, 5) +
                      __builtin_shufflevector(part[2], part[3], 2, 6, 3, 7);
  return __builtin_shufflevector(first, second, 0, 1, 4, 5) +
         __builtin_shufflevector(first, second, 2, 3, 6, 7);
}

template <typename T>
inline void add_dots(Vec (&sum)[kDotRows][kDotColumns], const T* const* rows, const float* const* columns,
                     ptrdiff_t t) {
  Vec row[kDotRows];
#pragma GCC unroll 6
  for (ptrdiff_t i = 0; i < kDotRows; ++i) {
    row[i] = load(rows[i] + t);
    hold(row[i]);
  }
#pragma GCC unroll 4
  for (ptrdiff_t j = 0; j < kDotColumns; ++j) {
    Vec column = load(columns[j] + t);
    hold(column);
#pragma GCC unroll 6
    for (ptrdiff_t i = 0; i < kDotRows; ++i) sum[i][j] += row[i] * column;
  }
}

template <typename T>
__attribute__((noinline)) void dot_tile(const T* const* row_at, const float* const* column_at, ptrdiff_t k,
                                        Quad* result) {
  const T* rows[kDotRows];
  const float* columns[kDotColumns];
#pragma GCC unroll 6
  for (ptrdiff_t i = 0; i < kDotRows; ++i) rows[i] = row_at[i];
#pragma GCC unroll 4
  for (ptrdiff_t j = 0; j < kDotColumns; ++j) columns[j] = column_at[j];
  Vec sum[kDotRows][kDotColumns] = {};
  ptrdiff_t t = 0;
  for (; t + kLanes <= k; t += kLanes) add_dots(sum, rows, columns, t);
  if (t < k) {
    // The last numbers, padded with zeros to a vector.
    T row_tails[kDotRows][kLanes] = {};
    float column_tails[kDotColumns][kLanes] = {};
    for (ptrdiff_t i = 0; i < kDotRows; ++i) {
      rows[i] = static_cast<T*>(__builtin_memcpy(row_tails[i], rows[i] + t, (k - t) * sizeof(T)));
    }
    for (ptrdiff_t j = 0; j < kDotColumns; ++j) {
      columns[j] =
          static_cast<float*>(__builtin_memcpy(column_tails[j], columns[j] + t, (k - t) * sizeof(float)));
    }
    add_dots(sum, rows, columns, 0);
  }
#pragma GCC unroll 6
  for (ptrdiff_t i = 0; i < kDotRows; ++i) result[i] = lane_sums(sum[i]);
}

template <typename T>
void dots(const Dots& x) {
  const auto* from = static_cast<const T*>(x.from);
  for (ptrdiff_t i = 0; i < x.m; i += kDotRows) {
    const T* rows[kDotRows];  // past the end, the last one stands in
    for (ptrdiff_t y = 0; y < kDotRows; ++y) rows[y] = from + (i + y < x.m ? i + y : x.m - 1) * x.row;
    for (ptrdiff_t j = 0; j < x.n; j += kDotColumns) {
      const float* columns[kDotColumns];
      for (ptrdiff_t y = 0; y < kDotColumns; ++y) {
        columns[y] = x.sketches + (j + y < x.n ? j + y : x.n - 1) * x.sketch_row;
      }
      Quad sums[kDotRows];
      dot_tile(rows, columns, x.k, sums);
      float* to = x.c.at + j / kColumns * x.c.panel + i * x.c.row + j % kColumns;
      for (ptrdiff_t y = 0; y < kDotRows && i + y < x.m; ++y, to += x.c.row) {
        for (ptrdiff_t z = 0; z < kDotColumns && j + z < x.n; ++z) {
          to[z] = x.accumulate ? to[z] + sums[y][z] : sums[y][z];
        }
      }
    }
  }
}

template <typename T, typename Terms>
constexpr ElementKernels element_kernels(ElementKernels::Pack* pack_a, ElementKernels::Pack* pack_b) {
  return {pack_a, pack_b, Terms::kTerms, multiply<Terms>, add_to_buckets<Terms>, dots<T>, sketch<T>};
}

template <typename T>
constexpr ElementKernels widened() {
  return element_kernels<T, Floats>(pack<kRows, T>, pack<kColumns, T>);
}

// TRACKSTAR_BFLOAT16_PAIRS puts pairs into levels that lack the instruction, for a test.
#if defined(__AVX512BF16__) || defined(TRACKSTAR_BFLOAT16_PAIRS)
constexpr ElementKernels kBfloat16 =
    element_kernels<Bfloat16, Pairs>(pack_pairs<kRows>, pack_pairs<kColumns>);
#else
constexpr ElementKernels kBfloat16 = widened<Bfloat16>();
#endif

}  // namespace

const GradientKernels gradient_kernels = {
    kRows,
    kColumns,
    multiply<Floats>,
    {widened<float>(), kBfloat16, widened<Half>()},
};

}  // namespace trackstar::TRACKSTAR_ISA
