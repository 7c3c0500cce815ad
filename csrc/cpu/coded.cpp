#include "cpu/coded.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/ahead.h"
#include "cpu/aligned.h"
#include "cpu/filter.h"
#include "cpu/isa.h"
#include "cpu/rounded_queries.h"
#include "cpu/signs.h"
#include "scoring.h"

namespace trackstar {

const CodedKernels& coded_kernels() {
  switch (isa()) {
#ifdef TRACKSTAR_HAS_amx
    case Isa::amx:
      return amx::coded_kernels;
#endif
#ifdef TRACKSTAR_HAS_v4_vnni
    case Isa::v4_bf16:
    case Isa::v4_vnni:
      if (isa_available(Isa::v4_vnni)) return v4_vnni::coded_kernels;
      [[fallthrough]];
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

double decoded_square(const Rows& rows, size_t n) {
  const CodeKernels& kernels = code_kernels(rows.type);
  const size_t block = block_bytes(rows.type, rows.d);
  const uint8_t* row = row_at(rows, n);
  if (rows.scales) return kernels.square(row, block, rows.scales + n * rows.L, rows.L, rows.d);
  const float one = 1;
  double total = 0;
  for (size_t b = 0; b < rows.L; ++b) total += kernels.square(row + b * block, block, &one, 1, rows.d);
  return total;
}

namespace {

// Scores rows by products of whole numbers.
class CodedSearch : public Filter {
 public:
  CodedSearch(const Sought& sought, const RoundedQueries& rounded, const std::vector<TopK>& tops)
      : Filter(sought, tops),
        rounded_(rounded),
        code_(code_kernels(rows_.type)),
        block_bytes_(block_bytes(rows_.type, rows_.d)),
        tile_rows_(rounded.tile_rows(rows_.N)),
        scores_(tile_rows_ * rounded.width),
        upper_(rounded.width),
        which_(rounded.width),
        squares_(tile_rows_) {
    if (rounded.panels.empty()) return;
    bytes_.resize(tile_rows_ * RoundedQueries::row_stride(rows_.L * rounded.padded));
    scales_.resize(rows_.L * tile_rows_);
  }

  void run(size_t begin, size_t end) override {
    for (size_t row = begin; row < end; row += tile_rows_) {
      const size_t count = std::min(tile_rows_, end - row);
      if (rounded_.panels.empty()) {
        score_few(row, count);
      } else {
        score_panels(row, count);
      }
      for (size_t r = 0; r < count; ++r) {
        for (Side& side : sides_) consider(side, row + r, r);
      }
    }
  }

  size_t tile_rows() const override { return tile_rows_; }

 private:
  void score_few(size_t row, size_t count) {
    const RoundedQueries::Few& few = rounded_.few;
    const FewQueries queries{rows_.L,           rows_.d,           few.codes.data(),
                             few.starts.data(), few.scales.data(), is_woven(rows_)};
    const FewKernel kernel = code_.few[rounded_.width - 1];
    for (size_t r = 0; r < count; ++r) {
      kernel(row_at(rows_, row + r), scales(row + r), block_bytes_, queries,
             scores_.data() + r * rounded_.width);
    }
  }

  void score_panels(size_t row, size_t count) {
    const size_t stride = RoundedQueries::row_stride(rows_.L * rounded_.padded);
    auto [making, multiplying] = rounded_.fetch(rows_, row, count);
    const size_t lines = making.share(count);
    for (size_t r = 0; r < count; ++r) {
      const float* scale = scales(row + r);
      squares_[r] = code_.expand(row_at(rows_, row + r), block_bytes_, scale, rows_.L, rows_.d,
                                 making.take(lines), bytes_.data() + r * stride);
      for (size_t b = 0; b < rows_.L; ++b) scales_[b * tile_rows_ + r] = scale[b];
    }
    rounded_.multiply({bytes_.data(), stride, scales_.data(), tile_rows_, count}, multiplying, scores_);
  }

  // Row n, at place r of the tile, enters for the queries whose best it may be among.
  void consider(Side& side, size_t n, size_t r) {
    const float* scores = scores_.data() + r * rounded_.width;
    if (rounded_.panels.empty()) {
      // Most rows are seen to fail already by what their norm is at most.
      if (!sought_.squared_norms && reaching(side, scores, most_norm(n), 0.0f) == 0) return;
      squares_[r] = code_.square(row_at(rows_, n), block_bytes_, scales(n), rows_.L, rows_.d);
    }
    const float norm = norm_of(n, squares_[r]), rest = sought_.squared_norms ? rest_of(n, squares_[r]) : 0.0f;
    const size_t count = reaching(side, scores, norm, rest);
    const ScoreBounds& fine = rounded_.rests.bounds;
    for (size_t i = 0; i < count; ++i) {
      const size_t q = which_[i];
      float upper = upper_[q];
      if (!std::isnan(side.thresholds[q])) {
        // A second look, at what was left of the query when it was rounded, is cheap beside an exact score.
        float left;
        code_.few[0](row_at(rows_, n), scales(n), block_bytes_, rounded_.rest(q), &left);
        upper = side.sign * (scores[q] + left) + norm * fine.wide[q] + rest * fine.far[q];
        if (upper <= side.thresholds[q]) continue;
      }
      enter(side, q, upper, n);
    }
  }

  size_t reaching(const Side& side, const float* scores, float norm, float rest) {
    const ScoreBounds& bounds = rounded_.bounds;
    return kernels_.reaching(scores, side.sign, side.contests.size(), norm, bounds.wide.data(), rest,
                             bounds.far.data(), side.thresholds.data(), upper_.data(), which_.data());
  }

  const RoundedQueries& rounded_;
  const CodeKernels& code_;
  const size_t block_bytes_, tile_rows_;
  Aligned<float> scores_;  // (row of the tile, width)
  std::vector<float> upper_;
  std::vector<uint32_t> which_;
  std::vector<double> squares_;  // of the tile's decoded rows
  Aligned<uint8_t> bytes_;       // (row of the tile, L, padded)
  std::vector<float> scales_;    // (L, row of the tile)
};

void search_topk(const Sought& sought, const std::vector<TopK>& tops, int64_t* rescored, int threads) {
  const Rows& rows = sought.codes;
  const size_t Q = tops.front().Q;
  const size_t roundings = ExactScores::roundings(sought.exact);
  std::vector<std::unique_ptr<Search>> searches;
  if (const TableKernels* kernels = rows.type == RowType::sign ? table_kernels(Q) : nullptr) {
    const SignTables tables(sought.queries, Q, rows.L, rows.d, *kernels, roundings);
    searches = make_scans(rows.N, threads, [&] { return sign_search(sought, tables, tops); });
    run_scans(searches, rows.N, tops);
  } else {
    const RoundedQueries rounded(sought.queries, Q, rows.L, rows.d, code_kernels(rows.type), coded_kernels(),
                                 roundings);
    searches =
        make_scans(rows.N, threads, [&] { return std::make_unique<CodedSearch>(sought, rounded, tops); });
    run_scans(searches, rows.N, tops);
  }
  for (size_t i = 0; rescored && i < tops.size() * Q; ++i) {
    rescored[i] = 0;
    for (const auto& search : searches) rescored[i] += search->rescored(i / Q, i % Q);
  }
}

}  // namespace

void coded_topk(const float* queries, const Rows& codes, const std::vector<TopK>& tops, int threads) {
  search_topk({queries, codes, codes, nullptr}, tops, nullptr, threads);
}

void rescored_topk(const float* queries, const Rows& codes, const Rows& wider, const float* squared_norms,
                   const std::vector<TopK>& tops, int64_t* rescored, int threads) {
  search_topk({queries, codes, wider, squared_norms}, tops, rescored, threads);
}

}  // namespace trackstar
