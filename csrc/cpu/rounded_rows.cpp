#include "cpu/rounded_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/coded.h"

namespace trackstar {
namespace {

constexpr size_t kTileBytes = 256 << 10;  // of rounded rows, which stay in the second-level cache
constexpr size_t kTileRows = 48;

size_t rows_of_tile(const RoundedQueries& rounded, size_t runs) {
  const size_t step = rounded.panels.front().kernel->rows;
  const size_t fit = std::min(kTileBytes / (runs * rounded.padded), kTileRows) / step * step;
  return std::max(fit, step);
}

// Roundings of an exact score.
size_t roundings(size_t L, size_t d) {
  return ExactScores::roundings({nullptr, RowType::float32, 0, nullptr, 1, L, d}, true);
}

}  // namespace

ByteQueries::ByteQueries(const float* values, size_t Q, size_t L, size_t d)
    : values(values),
      runs(d % kRun == 0 ? d / kRun : 1),
      size(d / runs),
      rounded(values, Q, L * runs, size, code_kernels(RowType::int8), coded_kernels(), roundings(L, d)),
      codes(Q * L * runs * rounded.padded),
      starts(Q * L * runs),
      scales(Q * L * runs),
      bounds(Q) {
  const CodedKernels& kernels = coded_kernels();
  std::vector<int8_t> first(size);
  std::vector<float> rest(size);
  for (size_t q = 0; q < Q; ++q) {
    double squares[2] = {}, rests[2] = {};
    for (size_t i = q * L * runs; i < (q + 1) * L * runs; ++i) {
      const float scale = kernels.round(values + i * size, size, first.data(), squares);
      for (size_t j = 0; j < size; ++j) rest[j] = values[i * size + j] - scale * first[j];
      int8_t* to = codes.data() + i * rounded.padded;
      scales[i] = kernels.round(rest.data(), size, to, rests);
      starts[i] = -code_kernels(RowType::int8).bias * std::accumulate(to, to + size, 0);
    }
    bounds.set(q, squares[0], rests[1], roundings(L, d) + 2 * L * runs * rounded.chunks + 16);
  }
}

ByteSearch::ByteSearch(const ByteQueries& queries, const Rows& rows, const std::vector<TopK>& tops)
    : Filter({queries.values, rows, rows, nullptr}, tops, true),
      queries_(queries),
      rounded_(queries.rounded),
      runs_(rows.L * queries.runs),
      run_bytes_(block_bytes(rows.type, queries.size)),
      tile_rows_(rows_of_tile(rounded_, runs_)),
      widen_(rows.type == RowType::float16    ? scoring_kernels().half.widen
             : rows.type == RowType::bfloat16 ? scoring_kernels().bfloat16.widen
                                              : nullptr),
      wide_(widen_ ? queries.size : 0),
      bytes_(tile_rows_ * runs_ * rounded_.padded),
      scales_(tile_rows_ * runs_),
      norms_(tile_rows_),
      rests_(tile_rows_),
      scores_(tile_rows_ * rounded_.width),
      upper_(rounded_.width),
      which_(rounded_.width) {}

void ByteSearch::run(size_t begin, size_t end) {
  for (size_t row = begin; row < end; row += tile_rows_) {
    const size_t count = std::min(tile_rows_, end - row);
    for (size_t r = 0; r < count; ++r) round(row + r, r);
    multiply(count);
    for (size_t r = 0; r < count; ++r) {
      for (Side& side : sides_) consider(side, row + r, r);
    }
  }
}

// Row n becomes bytes, at place r of the tile. A NaN among its scales makes all its rough scores NaN, which rule out
// nothing.
void ByteSearch::round(size_t n, size_t r) {
  const uint8_t* row = row_at(rows_, n);
  double squares[2] = {};
  for (size_t i = 0; i < runs_; ++i) {
    const auto* values = reinterpret_cast<const float*>(row + i * run_bytes_);
    if (widen_) {
      widen_(row + i * run_bytes_, queries_.size, wide_.data());
      values = wide_.data();
    }
    float of_run[2] = {};
    const float scale =
        kernels_.to_bytes(values, queries_.size, bytes_.data() + (r * runs_ + i) * rounded_.padded, of_run);
    const float block = scales(n)[i / queries_.runs];
    scales_[i * tile_rows_ + r] = bounded(block) ? scale * block : std::numeric_limits<float>::quiet_NaN();
    for (int j = 0; j < 2; ++j) squares[j] += double{block} * block * of_run[j];
  }
  // What the sums of squares and the differences lost to rounding counts as well.
  const double norm = 1.001 * std::sqrt(squares[0]);
  const double rest = 1.001 * std::sqrt(squares[1]) + 0x1p-22 * norm;
  norms_[r] = static_cast<float>(norm + rest);
  rests_[r] = static_cast<float>(rest);
}

// The rough scores of the tile.
void ByteSearch::multiply(size_t count) {
  const size_t stride = runs_ * rounded_.padded;
  std::fill(scores_.begin(), scores_.end(), 0.0f);
  for (size_t i = 0; i < runs_; ++i) {
    for (size_t chunk = 0; chunk < rounded_.chunks; ++chunk) {
      const size_t from = chunk * RoundedQueries::kChunk;
      const size_t depth = std::min(RoundedQueries::kChunk, rounded_.padded - from);
      for (const RoundedQueries::Panel& panel : rounded_.panels) {
        const size_t width = panel.kernel->queries;
        for (size_t r = 0; r < count; r += panel.kernel->rows) {
          panel.kernel->run(bytes_.data() + r * stride + i * rounded_.padded + from, stride,
                            panel.codes.data() + (i * rounded_.padded + from) * width, depth,
                            panel.starts.data() + (i * rounded_.chunks + chunk) * width,
                            scales_.data() + i * tile_rows_ + r, panel.scales.data() + i * width,
                            scores_.data() + r * rounded_.width + panel.first, rounded_.width);
        }
      }
    }
  }
}

// Row n, at place r of the tile, enters for the queries whose best it may be among. A second look, at what was left of
// those queries when they were rounded, is cheap beside an exact score.
void ByteSearch::consider(Side& side, size_t n, size_t r) {
  const float* scores = scores_.data() + r * rounded_.width;
  const ScoreBounds &rough = rounded_.bounds, &fine = queries_.bounds;
  const size_t count =
      kernels_.reaching(scores, side.sign, side.contests.size(), norms_[r], rough.wide.data(), rests_[r],
                        rough.far.data(), side.thresholds.data(), upper_.data(), which_.data());
  doubted_ += static_cast<double>(count);
  for (size_t i = 0; i < count; ++i) {
    const size_t q = which_[i], at = q * runs_;
    const float rest = kernels_.product(bytes_.data() + r * runs_ * rounded_.padded,
                                        queries_.codes.data() + at * rounded_.padded, runs_, rounded_.padded,
                                        queries_.starts.data() + at, scales_.data() + r, tile_rows_,
                                        queries_.scales.data() + at);
    const float most = side.sign * (scores[q] + rest) + norms_[r] * fine.wide[q] + rests_[r] * fine.far[q];
    if (!(most <= side.thresholds[q])) enter(side, q, most, n);
  }
}

}  // namespace trackstar
