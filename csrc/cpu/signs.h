// Sign rows, scored by table lookups.
#pragma once

#include <memory>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/filter.h"
#include "cpu/table_kernel.h"

namespace trackstar {

// Queries as tables of the sums that four signs give.
struct SignTables {
  // Queries (Q, L, d), dense; exact scores are rounded at most `exact_roundings` times one after another.
  SignTables(const float* queries, size_t Q, size_t L, size_t d, const TableKernels& kernels,
             size_t exact_roundings);

  const TableKernels& kernels;
  size_t words;               // of a block
  size_t stride;              // bytes of a query's tables
  Aligned<uint8_t> tables;    // (Q, L, words, kWordTables)
  std::vector<float> scales;  // (L, Q)
  ScoreBounds bounds;
};

// One thread's search with them.
std::unique_ptr<Search> sign_search(const Sought& sought, const SignTables& tables,
                                    const std::vector<TopK>& tops);

}  // namespace trackstar
