#include "scoring.h"

#include <memory>
#include <mutex>

#include "cpu/coded.h"
#include "cpu/isa.h"
#include "cpu/matrix.h"
#include "cpu/round_up.h"
#include "cpu/rounded_rows.h"
#include "cpu/row_reader.h"
#include "cpu/scan.h"

namespace trackstar {

const ScoringKernels& scoring_kernels() {
  switch (isa()) {
#ifdef TRACKSTAR_HAS_v4
    case Isa::amx:
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

const RowKernels& row_kernels(RowType type) {
  const ScoringKernels& kernels = scoring_kernels();
  return type == RowType::float16    ? kernels.half
         : type == RowType::bfloat16 ? kernels.bfloat16
                                     : kernels.single;
}

namespace {

constexpr size_t kPanelsAtOnce = 32;  // whose chunks fit the second-level cache

// Whether rounding rows first is worth it: by how many scores had to be computed all the same. Where those were too
// many, as many rows again go by before it is tried anew: more may be ruled out by then.
class Experience {
 public:
  // For k results: only a score that few rows reach rules out much.
  bool promising(size_t k) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return seen_ >= std::max({patience_, size_t{512}, 64 * k});
  }
  void pass(size_t rows) {
    const std::lock_guard<std::mutex> lock(mutex_);
    seen_ += rows;
  }
  // Of the scores of that many rows, so many were computed.
  void learn(size_t rows, size_t scores, size_t computed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    seen_ += rows;
    rows_ += rows;
    scores_ += scores;
    computed_ += computed;
    if (rows_ < kEnough) return;
    if (computed_ * kDear > scores_) patience_ = 2 * seen_;
    rows_ = scores_ = computed_ = 0;
  }

 private:
  static constexpr size_t kEnough = 192;  // rows, to judge by
  // Scores of a scan of floats less those of bytes that take as long as to compute one by itself.
  static constexpr size_t kDear = 8;

  std::mutex mutex_;
  size_t seen_ = 0, patience_ = 0;
  size_t rows_ = 0, scores_ = 0, computed_ = 0;  // since it was last judged
};

class ScoreScan : public Scan {
 public:
  // `bytes` may be null.
  ScoreScan(const Matrix& queries, const ByteQueries* bytes, Experience& experience, const Rows& rows,
            const std::vector<TopK>& tops, SharedThresholds& shared)
      : ScoreScan(queries, bytes ? std::make_unique<ByteRows>(*bytes, rows) : nullptr, experience, rows, tops,
                  shared, rows_of_tile(queries.block_rows(), queries.bytes())) {}

 private:
  // Multiplies `step` rows as floats at once; tiles are whole ones of bytes.
  ScoreScan(const Matrix& queries, std::unique_ptr<ByteRows> bytes, Experience& experience, const Rows& rows,
            const std::vector<TopK>& tops, SharedThresholds& shared, size_t step)
      : Scan(tops, rows.N, queries.width(), bytes ? round_up(step, bytes->tile_rows()) : step, shared),
        step_(step),
        reader_(rows, step),
        queries_(queries),
        bytes_(std::move(bytes)),
        experience_(experience),
        k_(tops.front().k),
        scores_of_row_(tops.size() * tops.front().Q) {}

  void look(size_t row, size_t count) override {
    if (bytes_ && settled() && experience_.promising(k_)) {
      for (size_t r = 0; r < count; r += bytes_->tile_rows()) {
        look_at_bytes(row + r, std::min(bytes_->tile_rows(), count - r));
      }
    } else {
      for (size_t r = 0; r < count; r += step_) Scan::look(row + r, std::min(step_, count - r));
      experience_.pass(count);
    }
  }

  void look_at_bytes(size_t row, size_t count) {
    bytes_->open(row, count);
    size_t computed = 0;
    for (size_t r = 0; r < count; ++r) {
      const size_t found = bytes_->doubtful(r, above_.data(), below_.data(), interesting_.data());
      for (size_t i = 0; i < found; ++i) {
        offer(interesting_[i], bytes_->score(r, interesting_[i]), static_cast<uint32_t>(row + r));
      }
      computed += found;
    }
    experience_.learn(count, count * scores_of_row_, computed);
  }

  void score(size_t row, size_t count) override {
    reader_.open(row, count);
    const size_t panels = queries_.panels().size();
    size_t begin = 0;
    do {
      const size_t end = std::min(begin + kPanelsAtOnce, panels);
      reader_.multiply(queries_, begin, end, scores_.data(), width_);
      begin = end;
    } while (begin < panels);
  }

  size_t step_;
  RowReader reader_;
  const Matrix& queries_;
  std::unique_ptr<ByteRows> bytes_;
  Experience& experience_;
  size_t k_, scores_of_row_;
};

}  // namespace

struct Queries::Layout {
  Layout(const float* values, size_t Q, size_t L, size_t d, RowType type, bool round)
      : matrix(type, Q, L, d) {
    for (size_t b = 0; b < L; ++b) matrix.set_block(b, values + b * d, L * d);
    if (round && ByteQueries::fits(Q, d)) bytes = std::make_unique<ByteQueries>(values, Q, L, d);
  }

  Matrix matrix;
  std::unique_ptr<const ByteQueries> bytes;
  Experience experience;
};

namespace {

template <typename Layout>
void scan(Layout& queries, const Rows& rows, const std::vector<TopK>& tops, int threads) {
  SharedThresholds shared(tops, threads);
  run_scans(rows.N, tops, threads, [&] {
    return std::make_unique<ScoreScan>(queries.matrix, queries.bytes.get(), queries.experience, rows, tops,
                                       shared);
  });
}

}  // namespace

Queries::Queries(const float* values, size_t Q, size_t L, size_t d, RowType type)
    : layout_(new Layout(values, Q, L, d, type, true)) {}
Queries::~Queries() = default;

void score_topk(const Queries& queries, const Rows& rows, const std::vector<TopK>& tops, int threads) {
  scan(*queries.layout_, rows, tops, threads);
}

void score_topk(const float* queries, const Rows& rows, const std::vector<TopK>& tops, int threads) {
  if (is_coded(rows.type)) return coded_topk(queries, rows, tops, threads);
  constexpr size_t kWorthRounding = 2048;  // rows
  Queries::Layout layout(queries, tops.front().Q, rows.L, rows.d, rows.type, rows.N >= kWorthRounding);
  scan(layout, rows, tops, threads);
}

}  // namespace trackstar
