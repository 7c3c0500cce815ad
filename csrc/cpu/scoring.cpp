#include "scoring.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "cpu/isa.h"
#include "cpu/scoring_kernel.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace trackstar {
namespace {

constexpr size_t kDepth = 256;        // numbers that are summed one after another: see scoring.h
constexpr size_t kTileRows = 48;      // rows that meet all queries before the next; a multiple of any block
constexpr size_t kPanelsAtOnce = 16;  // whose chunks fit the second-level cache

const ScoringKernels& kernels() {
  switch (isa()) {
#ifdef TRACKSTAR_HAS_v4
    case Isa::v4:
      return v4::scoring_kernels;
#endif
#ifdef TRACKSTAR_HAS_v3
    case Isa::v3:
      return v3::scoring_kernels;
#endif
    default:
      return baseline::scoring_kernels;
  }
}

// ---- Selection
// ---------------------------------------------------------------------------------------------

struct Candidate {
  float score;
  int64_t position;
};

// The order of the result: larger scores first, NaN last, ties to the smaller position.
bool better(const Candidate& a, const Candidate& b) {
  if (a.score > b.score) return true;
  if (a.score < b.score) return false;
  bool a_nan = std::isnan(a.score), b_nan = std::isnan(b.score);
  if (a_nan != b_nan) return b_nan;
  return a.position < b.position;
}

// The k best of the candidates offered so far, and some that were not yet weeded out. Positions come in
// ascending order, so a candidate that only equals the threshold has lost its tie.
class Reservoir {
 public:
  Reservoir(size_t k, size_t offers) : k_(k), capacity_(std::min(capacity(k), offers)) {
    candidates_.reserve(capacity_);
  }

  static size_t capacity(size_t k) { return 2 * k + 64; }

  // NaN, as long as nothing is known, lets everything through.
  bool wants(float score) const { return !(score <= threshold_); }

  void add(float score, int64_t position) {
    if (candidates_.size() == capacity_) weed();
    candidates_.push_back({score, position});
  }

  const std::vector<Candidate>& candidates() const { return candidates_; }

 private:
  void weed() {
    auto kth = candidates_.begin() + static_cast<ptrdiff_t>(k_ - 1);
    std::nth_element(candidates_.begin(), kth, candidates_.end(), better);
    threshold_ = kth->score;
    candidates_.resize(k_);
  }

  size_t k_;
  size_t capacity_;
  float threshold_ = std::numeric_limits<float>::quiet_NaN();
  std::vector<Candidate> candidates_;
};

// ---- Queries
// -----------------------------------------------------------------------------------------------

template <typename T>
struct CacheAligned {
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kAlignment)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kAlignment); }
  bool operator==(const CacheAligned&) const { return true; }
  bool operator!=(const CacheAligned&) const { return false; }
  static constexpr std::align_val_t kAlignment{64};
};
using Floats = std::vector<float, CacheAligned<float>>;

// Queries first … last - 1 in the layout of a panel kernel, padded with zeros.
struct Panel {
  const PanelKernel* kernel;
  size_t first, last;
  Floats values;
};

std::vector<Panel> pack_panels(const float* queries, size_t Q, size_t D) {
  const auto &narrow = kernels().narrow, &wide = kernels().wide;
  std::vector<Panel> panels;
  for (size_t first = 0, last; first < Q; first = last) {
    const PanelKernel& kernel = Q - first <= static_cast<size_t>(narrow.queries) ? narrow : wide;
    size_t width = kernel.queries;
    last = std::min(first + width, Q);
    Floats values(D * width);
    for (size_t q = first; q < last; ++q) {
      for (size_t i = 0; i < D; ++i) values[i * width + (q - first)] = queries[q * D + i];
    }
    panels.push_back({&kernel, first, last, std::move(values)});
  }
  return panels;
}

// ---- Scan
// --------------------------------------------------------------------------------------------------

struct Problem {
  const float* queries;
  const void* rows;
  RowType row_type;
  ptrdiff_t row_stride;
  const float* scales;
  size_t Q, N, L, d, k;
  bool largest;

  // Address of number i of row n.
  const void* row(size_t n, size_t i) const {
    ptrdiff_t offset = static_cast<ptrdiff_t>(n) * row_stride + static_cast<ptrdiff_t>(i);
    if (row_type == RowType::float16) return static_cast<const Half*>(rows) + offset;
    return static_cast<const float*>(rows) + offset;
  }

  // The smallest scores are the largest negated ones.
  float scale(size_t n, size_t block) const {
    float scale = scales ? scales[n * L + block] : 1.0f;
    return largest ? scale : -scale;
  }
};

// One thread's share: its working memory, and the best it has seen for each query.
class Scan {
 public:
  Scan(const Problem& problem, const std::vector<Panel>& panels)
      : problem_(problem),
        panels_(panels),
        region_(kTileRows * (panels.empty() ? problem.Q : panels.front().kernel->queries)),
        scores_(region_ * std::clamp<size_t>(panels.size(), 1, kPanelsAtOnce)),
        widened_(kMaxBlockRows * kDepth) {
    reservoirs_.reserve(problem.Q);
    for (size_t q = 0; q < problem.Q; ++q) reservoirs_.emplace_back(problem.k, problem.N);
  }

  // Scores a tile of rows. Calls come in ascending order.
  void run(size_t row, size_t count) {
    if (panels_.empty()) {
      score_dots(row, count);
      collect(row, count, 0, problem_.Q, problem_.Q, scores_.data());
      return;
    }
    for (size_t begin = 0; begin < panels_.size(); begin += kPanelsAtOnce) {
      size_t end = std::min(begin + kPanelsAtOnce, panels_.size());
      score_panels(row, count, begin, end);
      for (size_t p = begin; p < end; ++p) {
        const Panel& panel = panels_[p];
        collect(row, count, panel.first, panel.last, panel.kernel->queries,
                scores_.data() + (p - begin) * region_);
      }
    }
  }

  const std::vector<Candidate>& candidates(size_t query) const { return reservoirs_[query].candidates(); }

 private:
  // Kernels take whole blocks of rows. Past the end of the tile the last row stands in, and what they make of
  // it is not looked at.

  void score_dots(size_t row, size_t count) {
    const Problem& p = problem_;
    const DotKernel& kernel =
        (p.row_type == RowType::float16 ? kernels().dot_half : kernels().dot_single)[p.Q - 1];
    const size_t max_depth = kDepth * kernels().lanes;
    const void* rows[kMaxBlockRows];
    float scale[kMaxBlockRows];
    std::fill(scores_.begin(), scores_.end(), 0.0f);
    for (size_t first = 0; first < count; first += kernel.rows) {
      for (size_t block = 0; block < p.L; ++block) {
        for (size_t i = 0; i < p.d; i += max_depth) {
          for (int r = 0; r < kernel.rows; ++r) {
            size_t n = row + std::min(first + r, count - 1);
            rows[r] = p.row(n, block * p.d + i);
            scale[r] = p.scale(n, block);
          }
          kernel.run(rows, p.queries + block * p.d + i, p.L * p.d, std::min(max_depth, p.d - i), scale,
                     scores_.data() + first * p.Q);
        }
      }
    }
  }

  void score_panels(size_t row, size_t count, size_t begin, size_t end) {
    const Problem& p = problem_;
    const int block_rows = panels_.front().kernel->rows;
    const float* rows[kMaxBlockRows];
    const char* ahead[kMaxBlockRows];
    float scale[kMaxBlockRows];
    std::fill(scores_.begin(), scores_.end(), 0.0f);
    for (size_t block = 0; block < p.L; ++block) {
      for (size_t i = 0; i < p.d; i += kDepth) {
        size_t depth = std::min(kDepth, p.d - i), from = block * p.d + i;
        for (size_t first = 0; first < count; first += block_rows) {
          for (int r = 0; r < block_rows; ++r) {
            size_t n = row + std::min(first + r, count - 1);
            rows[r] = single(p.row(n, from), depth, r);
            ahead[r] = next(n, from + depth);
            scale[r] = p.scale(n, block);
          }
          for (size_t panel = begin; panel < end; ++panel) {
            const PanelKernel& kernel = *panels_[panel].kernel;
            kernel.run(rows, ahead, panels_[panel].values.data() + from * kernel.queries, depth, scale,
                       scores_.data() + (panel - begin) * region_ + first * kernel.queries);
          }
        }
      }
    }
  }

  // `depth` numbers as floats: the store's own, or row r of widened_.
  const float* single(const void* stored, size_t depth, int r) {
    if (problem_.row_type == RowType::float32) return static_cast<const float*>(stored);
    float* wide = widened_.data() + r * kDepth;
    kernels().widen(static_cast<const Half*>(stored), depth, wide);
    return wide;
  }

  // Where reading will go on after number i - 1 of row n: here, or a tile further.
  const char* next(size_t n, size_t i) const {
    bool finished = i == problem_.L * problem_.d;
    return static_cast<const char*>(finished ? problem_.row(std::min(n + kTileRows, problem_.N - 1), 0)
                                             : problem_.row(n, i));
  }

  // Offers scores (count, width) of queries first … last - 1 to their reservoirs.
  void collect(size_t row, size_t count, size_t first, size_t last, size_t width, const float* scores) {
    for (size_t r = 0; r < count; ++r) {
      for (size_t q = first; q < last; ++q) {
        float score = scores[r * width + (q - first)];
        if (reservoirs_[q].wants(score)) reservoirs_[q].add(score, static_cast<int64_t>(row + r));
      }
    }
  }

  const Problem& problem_;
  const std::vector<Panel>& panels_;  // none: few enough queries for dot kernels
  size_t region_;                     // scores of one panel
  Floats scores_;                     // (panel, row of the tile, query of the panel)
  Floats widened_;                    // a block of float16 rows
  std::vector<Reservoir> reservoirs_;
};

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace

void score_topk(const float* queries, const void* rows, RowType row_type, ptrdiff_t row_stride,
                const float* scales, size_t Q, size_t N, size_t L, size_t d, size_t k, bool largest,
                int threads, float* scores, int64_t* positions) {
  const Problem problem{queries, rows, row_type, row_stride, scales, Q, N, L, d, k, largest};
  const auto panels = Q <= kMaxDotQueries ? std::vector<Panel>() : pack_panels(queries, Q, L * d);
  const auto tiles = static_cast<ptrdiff_t>((N + kTileRows - 1) / kTileRows);
  threads = static_cast<int>(std::min<ptrdiff_t>(threads, tiles));

  // All memory is taken here, where running out of it is an ordinary exception.
  std::vector<Scan> scans;
  std::vector<std::vector<Candidate>> merged(threads);
  scans.reserve(threads);
  for (int t = 0; t < threads; ++t) {
    scans.emplace_back(problem, panels);
    merged[t].reserve(std::min(threads * Reservoir::capacity(k), N));
  }

#pragma omp parallel for num_threads(threads) schedule(monotonic : dynamic)
  for (ptrdiff_t tile = 0; tile < tiles; ++tile) {
    size_t row = tile * kTileRows;
    scans[thread_index()].run(row, std::min(kTileRows, N - row));
  }

#pragma omp parallel for num_threads(threads)
  for (ptrdiff_t q = 0; q < static_cast<ptrdiff_t>(Q); ++q) {
    auto& best = merged[thread_index()];
    best.clear();
    for (const Scan& scan : scans) {
      best.insert(best.end(), scan.candidates(q).begin(), scan.candidates(q).end());
    }
    std::partial_sort(best.begin(), best.begin() + static_cast<ptrdiff_t>(k), best.end(), better);
    for (size_t i = 0; i < k; ++i) {
      scores[q * k + i] = largest ? best[i].score : 0.0f - best[i].score;
      positions[q * k + i] = best[i].position;
    }
  }
}

}  // namespace trackstar
