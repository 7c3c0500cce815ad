#include "cpu/rounded_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/cache.h"
#include "cpu/coded.h"
#include "cpu/filter.h"
#include "cpu/isa.h"
#include "cpu/round_up.h"

namespace trackstar {
namespace {

constexpr size_t kNone = std::numeric_limits<size_t>::max();

// Roundings of a score that is computed.
size_t roundings(size_t L, size_t d) { return kChunkDepth + 2 * L * (d / kChunkDepth + 1) + 2; }

// As many as stay in the second-level cache: the floats of this tile and, where it is fetched meanwhile, of the next one,
// its bytes, and the queries if they leave room.
size_t rows_of_tile(const ByteQueries& queries, const Rows& rows) {
  const RoundedQueries& rounded = queries.rounded;
  const size_t tiles = rounded.panels.front().kernel->fetches ? 2 : 1;
  const size_t bytes = rounded.L * rounded.padded, floats = rows.L * block_bytes(rows.type, rows.d);
  const size_t cache = second_level_cache(), of_queries = rounded.width * bytes;
  const size_t room = cache - (of_queries < cache / 2 ? of_queries : 0);
  return rounded.tile_rows(room / (tiles * floats + bytes));
}

}  // namespace

bool ByteQueries::fits(size_t Q, size_t d) {
  // Without fast products of bytes nothing is saved.
  return Q >= kLeast && isa() != Isa::baseline && (d % kRun == 0 || d <= kMaxPiece);
}

ByteQueries::ByteQueries(const float* given, size_t Q, size_t L, size_t d)
    : L(L),
      d(d),
      runs(d % kRun == 0 ? d / kRun : 1),
      size(d / runs),
      rounded(given, Q, L * runs, size, code_kernels(RowType::int8), coded_kernels(), roundings(L, d)) {
  lay_across(given, Q);
}

void ByteQueries::lay_across(const float* given, size_t Q) {
  const ScoringKernels& kernels = scoring_kernels();
  const size_t across = kernels.lanes / kernels.group, full = d / kChunkDepth, rest = d % kChunkDepth;
  const size_t padded = round_up(rest, kernels.lanes);
  stride = (round_up(L * full, across) * kChunkDepth + round_up(rest > 0 ? L : 0, across) * padded);
  values.resize(Q * stride);
  // The n-th chunk that is `depth` numbers deep, of which there are `count`.
  const auto lay = [&](size_t n, size_t depth, const float* from, size_t count, float* to) {
    const size_t group = kernels.group;
    to += n / across * across * depth + n % across * group;
    for (size_t k = 0; k < count; k += group, to += across * group) {
      for (size_t j = 0; j < group && k + j < count; ++j) to[j] = from[k + j];
    }
  };
  for (size_t q = 0; q < Q; ++q) {
    for (size_t b = 0; b < L; ++b) {
      const float* from = given + (q * L + b) * d;
      float* to = values.data() + q * stride;
      for (size_t i = 0; i < full; ++i) {
        lay(b * full + i, kChunkDepth, from + i * kChunkDepth, kChunkDepth, to);
      }
      to += round_up(L * full, across) * kChunkDepth;
      lay(b, padded, from + full * kChunkDepth, rest, to);
    }
  }
}

ByteRows::ByteRows(const ByteQueries& queries, const Rows& rows)
    : queries_(queries),
      rounded_(queries.rounded),
      rows_(rows),
      kernels_(coded_kernels()),
      runs_(rows.L * queries.runs),
      tile_rows_(rows_of_tile(queries, rows)),
      widen_(rows.type == RowType::float32 ? nullptr : row_kernels(rows.type).widen),
      stride_(RoundedQueries::row_stride(runs_ * rounded_.padded)),
      bytes_(tile_rows_ * stride_),
      scales_(tile_rows_ * runs_),
      norms_(tile_rows_),
      rests_(tile_rows_),
      scores_(tile_rows_ * rounded_.width),
      wide_(widen_ ? rows.L * rows.d : 0),
      widened_(kNone),
      sums_(rows.L * (rows.d / kChunkDepth + 1)),
      ones_(rows.scales ? 0 : rows.L, 1.0f) {}

void ByteRows::open(size_t row, size_t count) {
  row_ = row;
  widened_ = kNone;
  auto [making, multiplying] = rounded_.fetch(rows_, row, count);
  const size_t lines = making.share(count);
  for (size_t r = 0; r < count; ++r) round(r, making.take(lines));
  rounded_.multiply({bytes_.data(), stride_, scales_.data(), tile_rows_, count}, multiplying, scores_);
}

// A row without bounds gets a norm of NaN, which rules out nothing.
void ByteRows::round(size_t r, const FetchLines& fetch) {
  const auto* row = reinterpret_cast<const float*>(row_at(rows_, row_ + r));
  if (widen_) {
    widen_(row, rows_.L * rows_.d, wide_.data());
    row = wide_.data();
  }
  const float* blocks = scales(r);
  double squares[2] = {};
  kernels_.to_bytes(row, {runs_, queries_.size, rounded_.padded, queries_.runs}, blocks, fetch,
                    bytes_.data() + r * stride_, scales_.data() + r, tile_rows_, squares);
  // What the sums of squares and the differences lost to rounding counts as well.
  const double norm = 1.001 * std::sqrt(squares[0]);
  const double rest = 1.001 * std::sqrt(squares[1]) + 0x1p-22 * norm;
  const bool known = std::all_of(blocks, blocks + rows_.L, [](float block) {
    return block == 0 || (std::fabs(block) >= kSmallestBlock && bounded(std::fabs(block)));
  });
  norms_[r] = known ? static_cast<float>(norm + rest) : std::numeric_limits<float>::quiet_NaN();
  rests_[r] = static_cast<float>(rest);
}

size_t ByteRows::doubtful(size_t r, const float* above, const float* below, uint32_t* which) const {
  const ScoreBounds &rough = rounded_.bounds, &fine = rounded_.rests.bounds;
  const float* scores = scores_.data() + r * rounded_.width;
  const size_t found = kernels_.doubtful(scores, rough.wide.size(), norms_[r], rough.wide.data(), rests_[r],
                                         rough.far.data(), above, below, which);
  // A second look, at what was left of those queries when they were rounded, is cheap beside a score.
  size_t count = 0;
  for (size_t i = 0; i < found; ++i) {
    const size_t q = which[i];
    const float rest = kernels_.product(bytes_.data() + r * stride_, rounded_.padded, scales_.data() + r,
                                        tile_rows_, rounded_.rest(q));
    const float score = scores[q] + rest, margin = norms_[r] * fine.wide[q] + rests_[r] * fine.far[q];
    if (!(score + margin <= above[q]) || !(score - margin >= below[q])) which[count++] = q;
  }
  return count;
}

float ByteRows::score(size_t r, size_t query) {
  const auto* row = reinterpret_cast<const float*>(row_at(rows_, row_ + r));
  if (widen_) {
    if (widened_ != r) widen_(row, rows_.L * rows_.d, wide_.data());
    widened_ = r;
    row = wide_.data();
  }
  return scoring_kernels().score_row(row, queries_.values.data() + query * queries_.stride, rows_.L, rows_.d,
                                     scales(r), sums_.data());
}

}  // namespace trackstar
