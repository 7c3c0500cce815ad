#include "cpu/filter.h"

#include <cmath>
#include <limits>

namespace trackstar {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

void ScoreBounds::set(size_t query, double squares, double lost, size_t roundings) {
  const double norm = std::sqrt(squares), error = std::sqrt(lost);
  const double rounding = 0x1p-23 * static_cast<double>(roundings) * (norm + error);
  const bool holds = bounded(static_cast<float>(norm));
  wide[query] = holds ? static_cast<float>(1.001 * (error + rounding)) : kInfinity;
  far[query] = holds ? static_cast<float>(1.001 * (norm + rounding)) : kInfinity;
}

Filter::Filter(const Sought& sought, const std::vector<TopK>& tops)
    : sought_(sought),
      rows_(sought_.codes),
      kernels_(coded_kernels()),
      ones_(rows_.scales ? 0 : rows_.L, 1.0f) {
  for (const TopK& top : tops) {
    const float sign = top.largest ? 1.0f : -1.0f;
    Side side{ExactScores(sought.queries, sought.exact, sign), sign, {}, {}};
    side.contests.reserve(top.Q);
    for (size_t q = 0; q < top.Q; ++q) {
      side.thresholds.push_back(floor_of(top.reached, q, top.largest));
      side.contests.emplace_back(top.k, rows_.N, side.thresholds.back());
    }
    sides_.push_back(std::move(side));
  }
}

void Filter::finish() {
  for (Side& side : sides_) {
    for (size_t q = 0; q < side.contests.size(); ++q) settle(side, q, true);
  }
}

void Filter::settle(Side& side, size_t query, bool all) {
  Contest& contest = side.contests[query];
  contest.settle(
      all, [&](const int64_t* positions, size_t count) { side.exact.fetch(positions, count); },
      [&](const int64_t* positions, size_t count, float* scores) {
        side.exact.score(query, positions, count, scores);
      });
  side.thresholds[query] = contest.threshold();
}

float Filter::norm_of(size_t n, double square) const {
  float largest, unused;
  kernels_.sizes(scales(n), rows_.L, &largest, &unused);
  return norm_of(square, largest);
}

float Filter::most_norm(size_t n) const {
  const float most = rows_.type == RowType::sign ? 1.0f : 128.0f;
  float largest, square;
  kernels_.sizes(scales(n), rows_.L, &largest, &square);
  return norm_of(static_cast<double>(square) * most * most * static_cast<double>(rows_.d), largest);
}

float Filter::rest_of(size_t n, double square) const {
  const float* norms = sought_.squared_norms + n * rows_.L;
  double whole = 0;
  for (size_t b = 0; b < rows_.L; ++b) whole += norms[b];
  // What encode_rows kept is a projection, but for roundings; float16 rows were rounded themselves.
  const double lost = std::max(0.0, whole - square) + 0x1p-20 * whole, norm = std::sqrt(whole);
  const Rows& exact = sought_.exact;
  const double step = exact.type != RowType::float16 ? 0.0
                      : exact.scales                 ? 0x1p-25 * exact.scales[n]
                                                     : 0x1p-25;
  const double rounding = (exact.type == RowType::float16 ? 0x1p-11 : 0x1p-23) * norm +
                          step * std::sqrt(static_cast<double>(rows_.L * rows_.d));
  return static_cast<float>(1.0001 * (std::sqrt(lost) + rounding));
}

}  // namespace trackstar
