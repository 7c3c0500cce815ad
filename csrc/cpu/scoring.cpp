#include "scoring.h"

#include <memory>

#include "cpu/coded.h"
#include "cpu/isa.h"
#include "cpu/matrix.h"
#include "cpu/row_reader.h"
#include "cpu/scan.h"

namespace trackstar {

const ScoringKernels& scoring_kernels() {
  switch (isa()) {
#ifdef TRACKSTAR_HAS_v4
    case Isa::v4_bf16:
    case Isa::v4_vnni:
    case Isa::v4:
      return v4::scoring_kernels;
#endif
#ifdef TRACKSTAR_HAS_v3
    case Isa::v3_vnni:
    case Isa::v3:
      return v3::scoring_kernels;
#endif
    default:
      return baseline::scoring_kernels;
  }
}

namespace {

constexpr size_t kPanelsAtOnce = 32;  // whose chunks fit the second-level cache

class ScoreScan : public Scan {
 public:
  ScoreScan(const Matrix& queries, const Rows& rows, const std::vector<TopK>& tops)
      : Scan(tops, rows.N, queries.width(), rows_of_tile(queries.block_rows(), queries.bytes())),
        reader_(rows, tile_rows()),
        queries_(queries),
        L_(rows.L) {}

 private:
  void score(size_t row, size_t count) override {
    reader_.open(row, count);
    const size_t panels = queries_.panels().size();
    size_t begin = 0;
    do {
      const size_t end = std::min(begin + kPanelsAtOnce, panels);
      for (size_t b = 0; b < L_; ++b) {
        reader_.multiply(b, queries_, b, begin, end, scores_.data(), width_);
      }
      begin = end;
    } while (begin < panels);
  }

  RowReader reader_;
  const Matrix& queries_;
  size_t L_;
};

}  // namespace

void score_topk(const float* queries, const Rows& rows, const std::vector<TopK>& tops, int threads) {
  if (is_coded(rows.type)) return coded_topk(queries, rows, tops, threads);
  Matrix matrix(tops.front().Q, rows.L, rows.d);
  for (size_t b = 0; b < rows.L; ++b) matrix.set_block(b, queries + b * rows.d, rows.L * rows.d);
  run_scans(rows.N, tops, threads, [&] { return std::make_unique<ScoreScan>(matrix, rows, tops); });
}

}  // namespace trackstar
