#include "cpu/scan.h"

#include <cmath>
#include <limits>

#include "cpu/round_up.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace trackstar {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr size_t kMaxTurnRows = 192;  // that a thread takes at once: few enough for all to finish together

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace

Scan::Scan(const std::vector<TopK>& tops, size_t N, size_t width, size_t tile_rows, SharedThresholds& shared)
    : kernels_(scoring_kernels()),
      width_(width),
      scores_(round_up(tile_rows, kMaxBlockRows) * width),
      above_(width, kInfinity),
      below_(width, -kInfinity),
      interesting_(width),
      tile_rows_(tile_rows),
      shared_(shared),
      thread_(shared.join()) {
  for (const TopK& top : tops) {
    const size_t share = shared.share(selections_.size());
    Selection selection{top.largest, {}};
    selection.reservoirs.reserve(top.Q);
    for (size_t q = 0; q < top.Q; ++q) {
      const float floor = floor_of(top.reached, q, top.largest);
      selection.reservoirs.emplace_back(top.k, share, N, floor);
      // Until something is known every score is of interest.
      unsettled_ += std::isnan(floor);
      (top.largest ? above_ : below_)[q] = top.largest ? floor : -floor;
    }
    selections_.push_back(std::move(selection));
  }
}

void Scan::run(size_t begin, size_t end) {
  for (size_t row = begin; row < end; row += tile_rows_) {
    catch_up();
    look(row, std::min(tile_rows_, end - row));
  }
}

void Scan::catch_up() {
  for (size_t top = 0; top < selections_.size(); ++top) {
    std::vector<Reservoir>& reservoirs = selections_[top].reservoirs;
    for (size_t q = 0; q < reservoirs.size(); ++q) {
      const float score = shared_.score(top, q), threshold = reservoirs[q].threshold();
      if (score <= threshold || score == -kInfinity) continue;
      reservoirs[q].raise(std::nextafter(score, -kInfinity));
      set_threshold(top, q, !std::isnan(threshold));
    }
  }
}

void Scan::set_threshold(size_t top, size_t query, bool was_known) {
  const Selection& selection = selections_[top];
  const float threshold = selection.reservoirs[query].threshold();
  (selection.largest ? above_ : below_)[query] = selection.largest ? threshold : -threshold;
  unsettled_ -= !was_known && !std::isnan(threshold);
}

void Scan::look(size_t row, size_t count) {
  std::fill(scores_.begin(), scores_.end(), 0.0f);
  score(row, count);
  for (size_t r = 0; r < count; ++r) {
    if (!valid(row + r)) continue;
    const float* scores = scores_.data() + r * width_;
    const size_t found = kernels_.outside(scores, above_.data(), below_.data(), width_, interesting_.data());
    for (size_t i = 0; i < found; ++i) {
      offer(interesting_[i], scores[interesting_[i]], static_cast<uint32_t>(row + r));
    }
  }
}

void Scan::offer(size_t query, float score, uint32_t position) {
  for (size_t top = 0; top < selections_.size(); ++top) {
    Selection& selection = selections_[top];
    if (query >= selection.reservoirs.size()) return;  // the NaN of a padding column
    Reservoir& reservoir = selection.reservoirs[query];
    const float signed_score = selection.largest ? score : -score;
    if (!reservoir.wants(signed_score)) continue;
    const float before = reservoir.threshold();
    const bool weeded = reservoir.add(signed_score, position);
    const float threshold = reservoir.threshold();
    if (!weeded || std::isnan(threshold)) continue;
    shared_.raise(top, query, threshold, thread_, reservoir.best());
    if (threshold != before) set_threshold(top, query, !std::isnan(before));
  }
}

void run_scans(const std::vector<std::unique_ptr<Search>>& scans, size_t N, const std::vector<TopK>& tops) {
  const auto threads = static_cast<int>(scans.size());
  std::vector<std::vector<Key>> merged(threads);
  for (auto& keys : merged) {
    for (const TopK& top : tops) keys.reserve(std::min(threads * Reservoir::capacity(top.k), N));
  }

  // A thread reads through the tiles of its turn without a break.
  const size_t tile_rows = scans.front()->tile_rows();
  const size_t turn = threads == 1 ? N : round_up(std::min(kMaxTurnRows, N / (8 * threads) + 1), tile_rows);
  const auto turns = static_cast<ptrdiff_t>((N + turn - 1) / turn);
#pragma omp parallel for num_threads(threads) schedule(monotonic : dynamic)
  for (ptrdiff_t i = 0; i < turns; ++i) {
    scans[thread_index()]->run(i * turn, std::min((i + 1) * turn, N));
  }
#pragma omp parallel for num_threads(threads)
  for (int i = 0; i < threads; ++i) scans[i]->finish();

  const size_t Q = tops.empty() ? 0 : tops.front().Q;
  const auto results = static_cast<ptrdiff_t>(tops.size() * Q);
#pragma omp parallel for num_threads(threads)
  for (ptrdiff_t i = 0; i < results; ++i) {
    const TopK& top = tops[i / Q];
    const size_t q = i % Q;
    auto& best = merged[thread_index()];
    best.clear();
    for (const auto& scan : scans) scan->collect(i / Q, q, best);
    const size_t found = std::min(top.k, best.size());
    const auto last = best.begin() + static_cast<ptrdiff_t>(found);
    std::nth_element(best.begin(), last, best.end());
    std::sort(best.begin(), last);
    for (size_t j = 0; j < found; ++j) {
      const float score = score_of(best[j]);
      top.scores[q * top.k + j] = top.largest ? score : 0.0f - score;  // no minus zero
      top.positions[q * top.k + j] = position_of(best[j]);
    }
    if (top.reached == nullptr) continue;
    for (size_t j = found; j < top.k; ++j) {
      top.scores[q * top.k + j] = std::numeric_limits<float>::quiet_NaN();
      top.positions[q * top.k + j] = -1;
    }
  }
}

}  // namespace trackstar
