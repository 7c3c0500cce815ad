// Queries rounded to whole numbers, in the layouts of the micro-kernels for narrow rows.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/ahead.h"
#include "cpu/aligned.h"
#include "cpu/coded_kernel.h"
#include "cpu/filter.h"

namespace trackstar {

struct RoundedQueries {
  // Queries (Q, L, d), dense; exact scores are rounded at most `exact_roundings` times one after another.
  RoundedQueries(const float* queries, size_t Q, size_t L, size_t d, const CodeKernels& codes,
                 const CodedKernels& kernels, size_t exact_roundings);

  static constexpr size_t kChunk = 512;  // elements of a block that a panel takes at once

  struct Few {
    Aligned<int8_t> codes;  // see FewQueries
    std::vector<int32_t> starts;
    std::vector<float> scales;
  };
  struct Panel {
    size_t first;
    const CodedPanelKernel* kernel;
    Aligned<int8_t> codes;        // (L, padded / 4, queries, 4)
    std::vector<int32_t> starts;  // (L, chunks, queries)
    std::vector<float> scales;    // (L, queries)
  };

  // Rows (count, L, padded) as bytes, `stride` from one to the next, with scales (L, rows).
  struct Tile {
    const uint8_t* bytes;
    size_t stride;
    const float* scales;
    size_t rows, count;
  };
  // What is fetched while rows row … row + count - 1 are made into bytes, row by row, and while these are multiplied.
  struct Fetching {
    Ahead making, multiplying;
  };
  Fetching fetch(const Rows& rows, size_t row, size_t count) const;
  // The tile's rough scores (count, width), by panels; meanwhile lines are fetched.
  void multiply(const Tile& tile, Ahead& ahead, Aligned<float>& scores) const;

  // Rows of a tile: whole steps of the kernels, at most `fit` and so few that their bytes stay in the second-level cache.
  size_t tile_rows(size_t fit) const;

  // From one row of L · padded bytes to the next, so that rows side by side do not fall on the same lines of the first
  // cache.
  static size_t row_stride(size_t bytes) { return bytes / 64 % 2 ? bytes : bytes + 64; }

  // What rounding left over of each query, rounded once more: each by itself, as FewQueries has it.
  struct Rests {
    Aligned<int8_t> codes;        // (Q, L, padded)
    std::vector<int32_t> starts;  // (Q, L, pieces, lanes)
    std::vector<float> scales;    // (Q, L)
    ScoreBounds bounds;           // of rough scores and these together
  };
  FewQueries rest(size_t q) const {
    return {L,
            d,
            rests.codes.data() + q * L * padded,
            rests.starts.data() + q * rests.starts.size() / rests.bounds.wide.size(),
            rests.scales.data() + q * L,
            false};
  }

  const CodedKernels& kernels;
  size_t L, d;
  size_t padded;  // elements of a block
  size_t chunks;  // of a block
  Few few;        // if there are no panels
  std::vector<Panel> panels;
  size_t width;  // of a tile of scores, padding included

  ScoreBounds bounds;
  Rests rests;
};

}  // namespace trackstar
