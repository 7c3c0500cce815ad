#include "scoring.h"

#include <memory>
#include <mutex>

#include "cpu/coded.h"
#include "cpu/isa.h"
#include "cpu/matrix.h"
#include "cpu/rounded_rows.h"
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

// Whether rounding rows first is worth it: by what was left of their scores to be looked at again, and to be computed.
// Where that was too much, as many rows again go by before it is tried anew: more may be ruled out by then.
class Experience {
 public:
  bool promising() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return seen_ >= patience_;
  }
  // Of that many rows' scores, so many were doubted, and computed.
  void learn(size_t rows, double scores, double doubted, double computed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    seen_ += rows;
    if (computed + doubted / kLooks > scores / kScores) patience_ = 2 * seen_;
  }

 private:
  // Second looks, and scores of a scan of floats less those of bytes, that take as long as to compute one score.
  static constexpr double kLooks = 16, kScores = 32;

  std::mutex mutex_;
  size_t seen_ = 0, patience_ = 0;
};

}  // namespace

struct Queries::Layout {
  Layout(const float* values, size_t Q, size_t L, size_t d) : matrix(Q, L, d) {
    for (size_t b = 0; b < L; ++b) matrix.set_block(b, values + b * d, L * d);
    // With fewer, or without fast products of bytes, rounding costs more than it saves.
    if (Q >= kLeast && isa() != Isa::baseline && ByteQueries::fits(d))
      bytes = std::make_unique<ByteQueries>(values, Q, L, d);
  }

  static constexpr size_t kLeast = 32;

  Matrix matrix;
  std::unique_ptr<const ByteQueries> bytes;
  Experience experience;
};

Queries::Queries(const float* values, size_t Q, size_t L, size_t d) : layout_(new Layout(values, Q, L, d)) {}
Queries::~Queries() = default;

void score_topk(const Queries& queries, const Rows& rows, const std::vector<TopK>& tops, int threads) {
  Queries::Layout& layout = *queries.layout_;
  bool known = layout.bytes != nullptr;
  for (const TopK& top : tops) known = known && top.reached != nullptr;
  if (!known || !layout.experience.promising()) {
    run_scans(rows.N, tops, threads, [&] { return std::make_unique<ScoreScan>(layout.matrix, rows, tops); });
    layout.experience.learn(rows.N, 0, 0, 0);
    return;
  }
  const auto searches =
      make_scans(rows.N, threads, [&] { return std::make_unique<ByteSearch>(*layout.bytes, rows, tops); });
  run_scans(searches, rows.N, tops);
  double doubted = 0, computed = 0;
  for (const auto& search : searches) {
    doubted += static_cast<const ByteSearch&>(*search).doubted();
    for (size_t top = 0; top < tops.size(); ++top) {
      for (size_t q = 0; q < tops[top].Q; ++q) computed += static_cast<double>(search->rescored(top, q));
    }
  }
  const auto scores = static_cast<double>(tops.size() * tops.front().Q) * static_cast<double>(rows.N);
  layout.experience.learn(rows.N, scores, doubted, computed);
}

void score_topk(const float* queries, const Rows& rows, const std::vector<TopK>& tops, int threads) {
  if (is_coded(rows.type)) return coded_topk(queries, rows, tops, threads);
  Matrix matrix(tops.front().Q, rows.L, rows.d);
  for (size_t b = 0; b < rows.L; ++b) matrix.set_block(b, queries + b * rows.d, rows.L * rows.d);
  run_scans(rows.N, tops, threads, [&] { return std::make_unique<ScoreScan>(matrix, rows, tops); });
}

}  // namespace trackstar
