#include <algorithm>

#include "cpu/contest.h"
#include "scoring.h"

namespace trackstar {

void merge_topk(const std::vector<Found>& parts, const TopK& top) {
  std::vector<Candidate> all;
  for (size_t q = 0; q < top.Q; ++q) {
    all.clear();
    for (const Found& part : parts) {
      for (size_t i = q * part.k; i < (q + 1) * part.k; ++i) {
        all.push_back({top.largest ? part.scores[i] : -part.scores[i], part.positions[i]});
      }
    }
    const size_t k = std::min(top.k, all.size());
    std::partial_sort(all.begin(), all.begin() + static_cast<ptrdiff_t>(k), all.end(), better);
    for (size_t i = 0; i < k; ++i) {
      top.scores[q * top.k + i] = top.largest ? all[i].score : -all[i].score;
      top.positions[q * top.k + i] = all[i].position;
    }
  }
}

}  // namespace trackstar
