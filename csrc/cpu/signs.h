// Sign rows, scored by table lookups.
#pragma once

#include <memory>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/filter.h"
#include "cpu/table_kernel.h"

namespace trackstar {

// Queries as tables of the sums that four signs give, rounded piece by piece: blocks, or parts of large ones.
struct SignTables {
  // Queries (Q, L, d), dense; exact scores are rounded at most `exact_roundings` times one after another.
  SignTables(const float* queries, size_t Q, size_t L, size_t d, const TableKernels& kernels,
             size_t exact_roundings);

  struct Piece {
    size_t block;
    size_t word, words;  // of the row
    size_t tables;       // where a query's tables have those of the piece
  };

  const TableKernels& kernels;
  std::vector<Piece> pieces;
  size_t stride = 0;          // bytes of a query's tables
  Aligned<uint8_t> tables;    // (Q, stride)
  std::vector<float> scales;  // (pieces, Q)
  ScoreBounds bounds;
};

// One thread's search with them.
std::unique_ptr<Search> sign_search(const Sought& sought, const SignTables& tables,
                                    const std::vector<TopK>& tops);

}  // namespace trackstar
