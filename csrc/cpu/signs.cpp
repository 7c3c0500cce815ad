#include "cpu/signs.h"

#include <algorithm>

#include "cpu/isa.h"

namespace trackstar {

const TableKernels* table_kernels() {
  switch (isa()) {
#ifdef TRACKSTAR_HAS_v4_vnni
    case Isa::v4_bf16:
    case Isa::v4_vnni:
      if (isa_available(Isa::v4_vnni)) return &v4_vnni::table_kernels;
      [[fallthrough]];
#endif
#ifdef TRACKSTAR_HAS_v3
    case Isa::v4:
    case Isa::v3_vnni:
    case Isa::v3:
      return &v3::table_kernels;
#endif
    default:
      return nullptr;
  }
}

SignTables::SignTables(const float* queries, size_t Q, size_t L, size_t d, const TableKernels& kernels,
                       size_t exact_roundings)
    : kernels(kernels),
      words((d + 31) / 32),
      stride(L * words * kWordTables),
      tables(Q * stride),
      scales(L * Q),
      bounds(Q) {
  for (size_t q = 0; q < Q; ++q) {
    double squares[2] = {};
    for (size_t b = 0; b < L; ++b) {
      scales[b * Q + q] = kernels.tabulate(queries + (q * L + b) * d, d,
                                           tables.data() + q * stride + b * words * kWordTables, squares);
    }
    bounds.set(q, squares[0], squares[1], exact_roundings + L * ((words + 63) / 64) + 16);
  }
}

namespace {

// A step's indices are shared by all queries and stay in the first-level cache, a tile's scores in the second.
constexpr size_t kTileRows = 4 * kTableRows;
constexpr size_t kStepWords = 16;  // that are worth the effort of bringing them into order

class SignSearch : public Filter {
 public:
  SignSearch(const Sought& sought, const SignTables& tables, const std::vector<TopK>& tops)
      : Filter(sought, tops),
        tables_(tables),
        Q_(tops.front().Q),
        step_(std::min(rows_.L, std::max<size_t>(1, kStepWords / tables.words))),
        indices_(kTileRows / kTableRows * step_ * tables.words * kWordIndices),
        scores_(Q_ * kTileRows),
        scales_(rows_.L * kTileRows),
        norms_(kTileRows),
        rests_(kTileRows),
        limits_(kTileRows),
        upper_(kTileRows),
        which_(kTileRows) {}

  size_t tile_rows() const override { return kTileRows; }

  void run(size_t begin, size_t end) override {
    for (size_t row = begin; row < end; row += kTileRows) {
      const size_t count = std::min(kTileRows, end - row);
      score(row, count);
      for (Side& side : sides_) {
        for (size_t q = 0; q < Q_; ++q) consider(side, q, row, count);
      }
    }
  }

 private:
  // Fills scores_, norms_ and rests_.
  void score(size_t row, size_t count) {
    const uint32_t* rows[kTileRows];
    for (size_t r = 0; r < kTileRows; ++r) {
      const size_t n = row + std::min(r, count - 1);
      rows[r] = reinterpret_cast<const uint32_t*>(row_at(rows_, n));
      const float* scale = scales(n);
      double square = 0;
      for (size_t b = 0; b < rows_.L; ++b) {
        scales_[b * kTileRows + r] = scale[b];
        square += static_cast<double>(scale[b]) * scale[b];
      }
      square *= static_cast<double>(rows_.d);
      norms_[r] = norm_of(n, square);
      rests_[r] = sought_.squared_norms ? rest_of(n, square) : 0.0f;
    }
    std::fill(scores_.begin(), scores_.end(), 0.0f);
    const size_t groups = (count + kTableRows - 1) / kTableRows, ahead = 4 * kTableRows * rows_.stride;
    for (size_t b = 0; b < rows_.L; b += step_) {
      const size_t blocks = std::min(step_, rows_.L - b), words = blocks * tables_.words;
      for (size_t group = 0; group < groups; ++group) {
        const uint32_t* from[kTableRows];
        for (size_t r = 0; r < kTableRows; ++r) from[r] = rows[group * kTableRows + r] + b * tables_.words;
        tables_.kernels.index(from, words, ahead, indices_.data() + group * words * kWordIndices);
      }
      for (size_t q = 0; q < Q_; q += kMaxTableQueries) {
        const size_t together = std::min(kMaxTableQueries, Q_ - q);
        for (size_t group = 0; group < groups; ++group) {
          for (size_t i = 0; i < blocks; ++i) {
            tables_.kernels.run[together - 1](
                indices_.data() + (group * blocks + i) * tables_.words * kWordIndices, tables_.words,
                tables_.tables.data() + q * tables_.stride + (b + i) * tables_.words * kWordTables,
                tables_.stride, scales_.data() + (b + i) * kTileRows + group * kTableRows,
                tables_.scales.data() + (b + i) * Q_ + q, scores_.data() + q * kTileRows + group * kTableRows,
                kTileRows);
          }
        }
      }
    }
  }

  // Rows of the tile enter for one query.
  void consider(Side& side, size_t query, size_t row, size_t count) {
    std::fill_n(limits_.begin(), count, side.thresholds[query]);
    const size_t found = kernels_.reaching(
        scores_.data() + query * kTileRows, side.sign, count, tables_.bounds.wide[query], norms_.data(),
        tables_.bounds.far[query], rests_.data(), limits_.data(), upper_.data(), which_.data());
    for (size_t i = 0; i < found; ++i) enter(side, query, upper_[which_[i]], row + which_[i]);
  }

  const SignTables& tables_;
  const size_t Q_, step_;             // blocks taken at once
  Aligned<uint8_t> indices_;          // (group of kTableRows, words of a step, kWordIndices)
  Aligned<float> scores_;             // (Q, row of the tile)
  std::vector<float> scales_;         // (L, row of the tile)
  std::vector<float> norms_, rests_;  // of the tile's rows
  std::vector<float> limits_, upper_;
  std::vector<uint32_t> which_;
};

}  // namespace

std::unique_ptr<Search> sign_search(const Sought& sought, const SignTables& tables,
                                    const std::vector<TopK>& tops) {
  return std::make_unique<SignSearch>(sought, tables, tops);
}

}  // namespace trackstar
