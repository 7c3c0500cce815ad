// Micro-kernels that score sign rows by table lookups, for the instruction sets that have shuffles of bytes.
//
// Four signs are a number below 16; for each four numbers of a query a table holds the 16 sums that their signs can
// give, as bytes. kTableRows rows are taken at once, and a shuffle looks up many of them.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace trackstar {

constexpr size_t kTableRows = 64;
constexpr size_t kWordIndices = 8 * kTableRows;  // bytes: 8 numbers below 16 of each row's word
constexpr size_t kWordTables = 8 * 16;           // bytes: of one query
constexpr size_t kMaxTableQueries = 2;

struct TableKernels {
  // The numbers of `words` words of kTableRows rows, in the kernel's order: (words, kWordIndices). Meanwhile what is
  // `ahead` bytes further on from each row is fetched.
  void (*index)(const uint32_t* const* rows, size_t words, size_t ahead, uint8_t* indices);

  // The tables (⌈d/32⌉, kWordTables) of d numbers rounded to whole multiples of the scale that is returned; adds Σ
  // values² to squares[0]. No signs' sum is changed by more than s by that, and s²/d is added to squares[1].
  float (*tabulate)(const float* values, size_t d, uint8_t* tables, double* squares);

  // Queries whose tables lie table_stride bytes apart, by number less one:
  //
  //     scores[q * score_stride + r] += scales[r] · query_scales[q] · Σ ± rounded
  void (*run[kMaxTableQueries])(const uint8_t* indices, size_t words, const uint8_t* tables,
                                size_t table_stride, const float* scales, const float* query_scales,
                                float* scores, size_t score_stride);
};

// Those of the level in force; null if it has none.
const TableKernels* table_kernels();

namespace v3 {
extern const TableKernels table_kernels;
}
namespace v4_vnni {
extern const TableKernels table_kernels;
}

}  // namespace trackstar
