// Micro-kernels that score sign rows by table lookups, for the instruction sets that have shuffles of bytes.
//
// Four signs are a number below 16; for each four numbers of a query a table holds the 16 sums that their signs can
// give, as bytes, and a shuffle looks up those of many rows.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/fetch_lines.h"
#include "cpu/round_up.h"

namespace trackstar {

constexpr size_t kTableRows = 64;       // that a call takes at most
constexpr size_t kTableWords = 32;      // of 32 signs, that a call takes at most
constexpr size_t kWordsTogether = 8;    // whose tables lie side by side
constexpr size_t kWordTables = 8 * 16;  // bytes: of one query and word

// Of so many words, with words whose sums are all 0 behind the last ones.
static constexpr size_t table_bytes(size_t words) { return round_up(words, kWordsTogether) * kWordTables; }

// Up to kTableRows rows, of which a call takes some words, the first `word` words from rows[r]; after the last row it is
// repeated.
struct TableRows {
  const uint32_t* const* rows;
  size_t count;
  size_t word, words;
  const float* scales;  // (kTableRows)
};

// Queries whose tables of these words lie `stride` bytes apart.
struct TableQueries {
  size_t count;
  const uint8_t* tables;
  size_t stride;
  const float* scales;  // (count)
};

struct TableKernels {
  // The tables of d numbers, table_bytes(⌈d/32⌉) in an order of the kernels' own, sums rounded to whole multiples of the
  // scale that is returned; adds Σ values² to squares[0]. No row's sum is changed by more than s by that, and s²/d is
  // added to squares[1].
  float (*tabulate)(const float* values, size_t d, uint8_t* tables, double* squares);

  // scores[q * kTableRows + r] += rows.scales[r] · queries.scales[q] · Σ rounded sums. Meanwhile it fetches lines.
  void (*run)(const TableRows& rows, const TableQueries& queries, const FetchLines& fetch, float* scores);
};

// Those of the level in force; null if it has none, or multiplies so many queries faster.
const TableKernels* table_kernels(size_t Q);

namespace v3 {
extern const TableKernels table_kernels;
}
namespace v4_vnni {
extern const TableKernels table_kernels;
}

}  // namespace trackstar
