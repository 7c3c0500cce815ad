#include "cpu/signs.h"

#include <algorithm>
#include <cmath>

#include "cpu/ahead.h"
#include "cpu/isa.h"

namespace trackstar {

const TableKernels* table_kernels([[maybe_unused]] size_t Q) {
  switch (isa()) {
#ifdef TRACKSTAR_HAS_v4_vnni
    case Isa::amx:
      // Tables take 3.6 ms for 4 queries (20,000 rows of 4,096), 12.9 for 32; products 6.1 and 9.7.
      return Q <= 16 ? &v4_vnni::table_kernels : nullptr;
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
    : kernels(kernels), bounds(Q) {
  const size_t block_words = (d + 31) / 32;
  for (size_t b = 0; b < L; ++b) {
    for (size_t word = 0; word < block_words; word += kTableWords) {
      const size_t count = std::min(kTableWords, block_words - word);
      pieces.push_back({b, b * block_words + word, count, stride});
      stride += table_bytes(count);
    }
  }
  tables.resize(Q * stride);
  scales.resize(pieces.size() * Q);
  for (size_t q = 0; q < Q; ++q) {
    double squares[2] = {};
    for (size_t p = 0; p < pieces.size(); ++p) {
      const Piece& piece = pieces[p];
      const size_t from = 32 * (piece.word - piece.block * block_words),
                   n = std::min(32 * piece.words, d - from);
      scales[p * Q + q] = kernels.tabulate(queries + (q * L + piece.block) * d + from, n,
                                           tables.data() + q * stride + piece.tables, squares);
    }
    bounds.set(q, squares[0], squares[1], exact_roundings + pieces.size() + 16);
  }
}

namespace {

class SignSearch : public Filter {
 public:
  SignSearch(const Sought& sought, const SignTables& tables, const std::vector<TopK>& tops)
      : Filter(sought, tops),
        tables_(tables),
        Q_(tops.front().Q),
        scores_(Q_ * kTableRows),
        scales_(rows_.L * kTableRows),
        norms_(kTableRows),
        rests_(kTableRows),
        limits_(kTableRows),
        upper_(kTableRows),
        which_(kTableRows) {}

  size_t tile_rows() const override { return kTableRows; }

  void run(size_t begin, size_t end) override {
    for (size_t row = begin; row < end; row += kTableRows) {
      const size_t count = std::min(kTableRows, end - row);
      measure(row, count);
      score(row, count);
      for (Side& side : sides_) {
        for (size_t q = 0; q < Q_; ++q) consider(side, q, row, count);
      }
    }
  }

 private:
  // Fills scales_, norms_ and rests_.
  void measure(size_t row, size_t count) {
    float squares[kTableRows] = {}, largest[kTableRows] = {};
    for (size_t r = 0; r < kTableRows; ++r) {
      const float* scale = scales(row + std::min(r, count - 1));
      for (size_t b = 0; b < rows_.L; ++b) scales_[b * kTableRows + r] = scale[b];
    }
    for (size_t b = 0; b < rows_.L; ++b) {
      const float* scale = scales_.data() + b * kTableRows;
      for (size_t r = 0; r < kTableRows; ++r) {
        const float size = std::fabs(scale[r]);
        largest[r] = size <= largest[r] ? largest[r] : size;  // a NaN stays
        squares[r] += size * size;
      }
    }
    // Each sign is 1.
    for (float& square : squares) square *= static_cast<float>(rows_.d);
    for (size_t r = 0; r < kTableRows; ++r) norms_[r] = norm_of(squares[r], largest[r]);
    if (!sought_.squared_norms) return;
    for (size_t r = 0; r < count; ++r) rests_[r] = rest_of(row + r, (1 - 0x1p-20) * squares[r]);
  }

  // Fills scores_; meanwhile the next tile is fetched.
  void score(size_t row, size_t count) {
    const uint32_t* rows[kTableRows];
    for (size_t r = 0; r < kTableRows; ++r) {
      rows[r] = reinterpret_cast<const uint32_t*>(row_at(rows_, row + std::min(r, count - 1)));
    }
    std::fill(scores_.begin(), scores_.end(), 0.0f);
    Ahead ahead;
    ahead.open(rows_, row + kTableRows, kTableRows);
    const size_t lines = ahead.share(tables_.pieces.size());
    for (size_t p = 0; p < tables_.pieces.size(); ++p) {
      const SignTables::Piece& piece = tables_.pieces[p];
      tables_.kernels.run(
          {rows, count, piece.word, piece.words, scales_.data() + piece.block * kTableRows},
          {Q_, tables_.tables.data() + piece.tables, tables_.stride, tables_.scales.data() + p * Q_},
          ahead.take(lines), scores_.data());
    }
  }

  // Rows of the tile enter for one query.
  void consider(Side& side, size_t query, size_t row, size_t count) {
    std::fill_n(limits_.begin(), count, side.thresholds[query]);
    const size_t found = kernels_.reaching(
        scores_.data() + query * kTableRows, side.sign, count, tables_.bounds.wide[query], norms_.data(),
        tables_.bounds.far[query], rests_.data(), limits_.data(), upper_.data(), which_.data());
    for (size_t i = 0; i < found; ++i) enter(side, query, upper_[which_[i]], row + which_[i]);
  }

  const SignTables& tables_;
  const size_t Q_;
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
