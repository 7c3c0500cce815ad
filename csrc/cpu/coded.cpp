#include "cpu/coded.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/contest.h"
#include "cpu/exact_scores.h"
#include "cpu/isa.h"
#include "cpu/rounded_queries.h"
#include "scoring.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace trackstar {

const CodedKernels& coded_kernels() {
  switch (isa()) {
#ifdef TRACKSTAR_HAS_v4_vnni
    case Isa::v4_bf16:
    case Isa::v4_vnni:
      return v4_vnni::coded_kernels;
#endif
#ifdef TRACKSTAR_HAS_v4
    case Isa::v4:
      return v4::coded_kernels;
#endif
#ifdef TRACKSTAR_HAS_v3_vnni
    case Isa::v3_vnni:
      return v3_vnni::coded_kernels;
#endif
#ifdef TRACKSTAR_HAS_v3
    case Isa::v3:
      return v3::coded_kernels;
#endif
    default:
      return baseline::coded_kernels;
  }
}

const CodeKernels& code_kernels(RowType type) {
  const CodedKernels& kernels = coded_kernels();
  return type == RowType::int8 ? kernels.int8 : type == RowType::int4 ? kernels.int4 : kernels.sign;
}

namespace {

constexpr size_t kTileBytes = 256 << 10;  // of expanded rows, which stay in the second-level cache
constexpr size_t kTileRows = 48;

// What the scores of a call are about: the rows that are scanned, and the rows that are scored exactly.
struct Search {
  const float* queries;
  Rows codes;
  Rows exact;
  const float* squared_norms;  // of the exact rows, (N, L); null if those are the codes
};

// One thread's share of a scan.
class CodedScan {
 public:
  CodedScan(const Search& search, const RoundedQueries& rounded, const TopK& top)
      : search_(search),
        rows_(search.codes),
        rounded_(rounded),
        kernel_(code_kernels(rows_.type)),
        exact_(search.queries, search.exact, top.largest ? 1.0f : -1.0f),
        block_bytes_(block_bytes(rows_.type, rows_.d)),
        tile_rows_(tile_rows(rounded)),
        scores_((tile_rows_ + kMaxFewRows) * rounded.width),
        thresholds_(rounded.width, std::numeric_limits<float>::quiet_NaN()),
        wide_(rounded.wide),
        far_(rounded.far),
        upper_(rounded.width + coded_kernels().lanes),
        which_(rounded.width + coded_kernels().lanes),
        ones_(rows_.scales ? 0 : rows_.L, 1.0f) {
    if (!rounded.panels.empty()) {
      bytes_.resize(tile_rows_ * rows_.L * rounded.padded);
      scales_.resize(rows_.L * tile_rows_);
      squares_.resize(tile_rows_);
    }
    const size_t padded = (rounded.width + 63) / 64 * 64;
    wide_.resize(padded);
    far_.resize(padded);
    thresholds_.resize(padded, std::numeric_limits<float>::infinity());
    upper_.resize(padded);
    which_.resize(padded);
    scores_.resize(scores_.size() + 64);
    contests_.reserve(top.Q);
    for (size_t q = 0; q < top.Q; ++q) contests_.emplace_back(top.k, rows_.N);
  }

  static size_t tile_rows(const RoundedQueries& rounded) {
    if (rounded.panels.empty()) return kTileRows;
    const size_t step = rounded.panels.front().kernel->rows;
    const size_t fit = kTileBytes / (rounded.L * rounded.padded) / step * step;
    return std::min(std::max(fit, step), kTileRows);
  }

  // Scores a tile of rows. Calls come in ascending order.
  void run(size_t row, size_t count) {
    if (!rounded_.panels.empty()) {
      score_panels(row, count);
      for (size_t r = 0; r < count; ++r) enter(row + r, scores_.data() + r * rounded_.width, squares_[r]);
      return;
    }
    score_few(row, count);
    for (size_t r = 0; r < count; ++r) {
      // Most rows are seen to fail already by what their square is at most.
      const float* scores = scores_.data() + r * rounded_.width;
      if (search_.squared_norms || reaching(scores, most_norm(row + r), 0.0f) > 0) {
        enter(row + r, scores, square(row + r));
      }
    }
  }

  void finish() {
    for (size_t q = 0; q < contests_.size(); ++q) settle(q);
  }

  const Contest& contest(size_t query) const { return contests_[query]; }

 private:
  const float* scales(size_t n) const { return rows_.scales ? rows_.scales + n * rows_.L : ones_.data(); }

  void score_few(size_t row, size_t count) {
    const uint8_t* rows[kMaxFewRows];
    const float* row_scales[kMaxFewRows];
    for (const RoundedQueries::Few& group : rounded_.few) {
      const FewKernel& kernel = kernel_.few[group.count - 1];
      const FewQueries queries{rows_.L, rows_.d, group.codes.data(), group.starts.data(),
                               group.scales.data()};
      for (size_t first = 0; first < count; first += kernel.rows) {
        for (int r = 0; r < kernel.rows; ++r) {
          const size_t n = row + std::min(first + r, count - 1);
          rows[r] = row_at(rows_, n);
          row_scales[r] = scales(n);
        }
        kernel.run(rows, row_scales, block_bytes_, queries,
                   scores_.data() + first * rounded_.width + group.first, rounded_.width);
      }
    }
  }

  void score_panels(size_t row, size_t count) {
    const size_t stride = rows_.L * rounded_.padded;
    for (size_t r = 0; r < count; ++r) {
      const float* scale = scales(row + r);
      squares_[r] = kernel_.expand(row_at(rows_, row + r), block_bytes_, scale, rows_.L, rows_.d,
                                   bytes_.data() + r * stride);
      for (size_t b = 0; b < rows_.L; ++b) scales_[b * tile_rows_ + r] = scale[b];
    }
    // Meanwhile the next tile is fetched, a few lines for every call of the kernel.
    const size_t calls =
        rows_.L * rounded_.chunks * rounded_.panels.size() *
        ((count + rounded_.panels.front().kernel->rows - 1) / rounded_.panels.front().kernel->rows);
    const uint8_t* next = row_at(rows_, row + count);
    const size_t lines =
        (static_cast<size_t>(row_at(rows_, row + 2 * count) - next) / 64 + calls - 1) / calls;
    std::fill(scores_.begin(), scores_.end(), 0.0f);
    for (size_t b = 0; b < rows_.L; ++b) {
      for (size_t chunk = 0; chunk < rounded_.chunks; ++chunk) {
        const size_t from = chunk * RoundedQueries::kChunk;
        const size_t depth = std::min(RoundedQueries::kChunk, rounded_.padded - from);
        for (const RoundedQueries::Panel& panel : rounded_.panels) {
          const CodedPanelKernel& kernel = *panel.kernel;
          const size_t width = kernel.queries;
          for (size_t r = 0; r < count; r += kernel.rows) {
            for (size_t line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
            kernel.run(bytes_.data() + r * stride + b * rounded_.padded + from, stride,
                       panel.codes.data() + (b * rounded_.padded + from) * width, depth,
                       panel.starts.data() + (b * rounded_.chunks + chunk) * width,
                       scales_.data() + b * tile_rows_ + r, panel.scales.data() + b * width,
                       scores_.data() + r * rounded_.width + panel.first, rounded_.width);
          }
        }
      }
    }
  }

  // Enters row n for all queries whose best it may be among.
  void enter(size_t n, const float* scores, double square) {
    const float norm = norm_of(n, square), rest = search_.squared_norms ? rest_of(n, square) : 0.0f;
    const size_t count = reaching(scores, norm, rest);
    for (size_t i = 0; i < count; ++i) {
      const size_t q = which_[i];
      contests_[q].enter(upper_[q], static_cast<int64_t>(n));
      if (contests_[q].full()) settle(q);
    }
  }

  size_t reaching(const float* scores, float norm, float rest) {
    return coded_kernels().reaching(scores, contests_.size(), norm, wide_.data(), rest, far_.data(),
                                    thresholds_.data(), upper_.data(), which_.data());
  }

  // What the norm of a decoded row is at most, by its scales alone.
  float most_norm(size_t n) const {
    const float most = rows_.type == RowType::int8 ? 128.0f : rows_.type == RowType::int4 ? 8.0f : 1.0f;
    float largest, square;
    coded_kernels().sizes(scales(n), rows_.L, &largest, &square);
    return largest <= kLargest && largest >= kSmallest
               ? 1.01f * most * std::sqrt(square * static_cast<float>(rows_.d))
               : std::numeric_limits<float>::quiet_NaN();
  }

  double square(size_t n) const {
    return kernel_.square(row_at(rows_, n), block_bytes_, scales(n), rows_.L, rows_.d);
  }

  // A decoded row's norm from its square, rounded up; NaN if its scales are not what the bounds are made for.
  float norm_of(size_t n, double square) const {
    float largest, unused;
    coded_kernels().sizes(scales(n), rows_.L, &largest, &unused);
    if (!(largest <= kLargest) || (largest > 0 && largest < kSmallest)) {
      return std::numeric_limits<float>::quiet_NaN();
    }
    return 1.01f * static_cast<float>(std::sqrt(square));  // for codes of -128, which count as -127 · 128
  }

  // The distance between a decoded row and the one that is scored exactly, rounded up.
  float rest_of(size_t n, double square) const {
    const float* norms = search_.squared_norms + n * rows_.L;
    double whole = 0;
    for (size_t b = 0; b < rows_.L; ++b) whole += norms[b];
    // What encode_rows kept is a projection, but for roundings; float16 rows were rounded themselves.
    const double lost = std::max(0.0, whole - square) + 0x1p-20 * whole;
    const double narrowing =
        search_.exact.type == RowType::float16
            ? 0x1p-11 * std::sqrt(whole) + 0x1p-25 * std::sqrt(static_cast<double>(rows_.L * rows_.d))
            : 0x1p-23 * std::sqrt(whole);
    return static_cast<float>(1.0001 * (std::sqrt(lost) + narrowing));
  }

  void settle(size_t q) {
    contests_[q].settle([&](const int64_t* positions, size_t count, float* scores) {
      exact_.score(q, positions, count, scores);
    });
    thresholds_[q] = contests_[q].threshold();
  }

  const Search& search_;
  const Rows& rows_;
  const RoundedQueries& rounded_;
  const CodeKernels& kernel_;
  ExactScores exact_;
  size_t block_bytes_, tile_rows_;
  Aligned<float> scores_;  // (row of the tile, width)
  std::vector<float> thresholds_, wide_, far_, upper_;
  std::vector<int32_t> which_;
  std::vector<double> squares_;  // of the tile's decoded rows
  std::vector<float> ones_;
  Aligned<uint8_t> bytes_;     // (row of the tile, L, padded)
  std::vector<float> scales_;  // (L, row of the tile)
  std::vector<Contest> contests_;
};

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

void search_topk(const Search& search, const TopK& top, int64_t* rescored, int threads) {
  const Rows& rows = search.codes;
  const CodeKernels& code = code_kernels(rows.type);
  const float sign = (top.largest ? 1.0f : -1.0f) * (rows.type == RowType::sign ? -1.0f : 1.0f);
  const RoundedQueries rounded(search.queries, top.Q, rows.L, rows.d, sign, code, coded_kernels(),
                               ExactScores::roundings(search.exact));
  const size_t tile_rows = CodedScan::tile_rows(rounded);
  const auto tiles = static_cast<ptrdiff_t>((rows.N + tile_rows - 1) / tile_rows);
  threads = static_cast<int>(std::min<ptrdiff_t>(threads, tiles));
  std::vector<std::unique_ptr<CodedScan>> scans(threads);
  std::vector<std::vector<Candidate>> merged(threads);
  for (int t = 0; t < threads; ++t) {
    scans[t] = std::make_unique<CodedScan>(search, rounded, top);
    merged[t].reserve(std::min(threads * top.k, rows.N));
  }

#pragma omp parallel num_threads(threads)
  {
    CodedScan& scan = *scans[thread_index()];
#pragma omp for schedule(monotonic : dynamic)
    for (ptrdiff_t tile = 0; tile < tiles; ++tile) {
      const size_t row = tile * tile_rows;
      scan.run(row, std::min(tile_rows, rows.N - row));
    }
    scan.finish();
  }

  for (size_t q = 0; q < top.Q; ++q) {
    std::vector<Candidate>& best = merged[0];
    best.clear();
    int64_t scored = 0;
    for (const auto& scan : scans) {
      const Contest& contest = scan->contest(q);
      best.insert(best.end(), contest.best().begin(), contest.best().end());
      scored += contest.scored();
    }
    const size_t found = std::min(top.k, best.size());
    std::partial_sort(best.begin(), best.begin() + static_cast<ptrdiff_t>(found), best.end(), better);
    for (size_t i = 0; i < found; ++i) {
      top.scores[q * top.k + i] = top.largest ? best[i].score : 0.0f - best[i].score;  // no minus zero
      top.positions[q * top.k + i] = best[i].position;
    }
    if (rescored) rescored[q] = scored;
  }
}

}  // namespace

void coded_topk(const float* queries, const Rows& codes, const TopK& top, int threads) {
  search_topk({queries, codes, codes, nullptr}, top, nullptr, threads);
}

void rescored_topk(const float* queries, const Rows& codes, const Rows& wider, const float* squared_norms,
                   const TopK& top, int64_t* rescored, int threads) {
  search_topk({queries, codes, wider, squared_norms}, top, rescored, threads);
}

}  // namespace trackstar
