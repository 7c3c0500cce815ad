// Micro-kernels that score sign rows by table lookups, for the instruction sets that have shuffles of bytes.
//
// Four signs are a number below 16; for each four numbers of a query a table holds the 16 sums that their signs can
// give, as bytes. kTableRows rows are taken at once, and a shuffle looks up many of them.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace trackstar {

constexpr size_t kTableRows = 16;
constexpr size_t kTableWords = 16;      // of 32 signs, that a call takes at most
constexpr size_t kWordTables = 8 * 16;  // bytes: of one query
constexpr size_t kMaxTableQueries = 4;

struct TableKernels {
  // The tables (⌈d/32⌉, kWordTables) of d numbers, sums rounded to whole multiples of the scale that is returned; adds
  // Σ values² to squares[0]. No row's sum is changed by more than s by that, and s²/d is added to squares[1].
  float (*tabulate)(const float* values, size_t d, uint8_t* tables, double* squares);

  // kTableRows rows, whose words begin `word` words from rows[r], and queries whose tables lie table_stride bytes apart,
  // by number less one:
  //
  //     scores[q * score_stride + r] += scales[r] · query_scales[q] · Σ rounded sums
  void (*run[kMaxTableQueries])(const uint32_t* const* rows, size_t word, size_t words, const uint8_t* tables,
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
