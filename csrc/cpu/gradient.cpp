#include "gradient.h"

#include <algorithm>
#include <vector>

#include "cpu/gradient_forms.h"
#include "cpu/isa.h"

namespace trackstar {
namespace {

const GradientKernels& kernels_in_force() {
  switch (isa()) {
#ifdef TRACKSTAR_HAS_v3
    case Isa::v3_vnni:
    case Isa::v3:
      return v3::gradient_kernels;
#endif
#ifdef TRACKSTAR_HAS_v4
    case Isa::v4_vnni:
    case Isa::v4:
      return v4::gradient_kernels;
#endif
#ifdef TRACKSTAR_HAS_v4_bf16
    case Isa::amx:
    case Isa::v4_bf16:
      return v4_bf16::gradient_kernels;
#endif
    default:
      return baseline::gradient_kernels;
  }
}

}  // namespace

std::vector<Bucket> buckets_of(const float* sketches, int64_t rank, int64_t rows, int64_t columns,
                               int64_t padded) {
  std::vector<Bucket> buckets(rank * padded);
  for (int64_t r = 0; r < rank; ++r) {
    for (int64_t q = 0; q < rows; ++q, sketches += columns) {
      for (int64_t i = 0; i < columns; ++i) {
        if (sketches[i] == 0.0f) continue;
        Bucket& bucket = buckets[r * padded + i];
        if (bucket.value != 0.0f) return {};
        bucket = {static_cast<int32_t>(q), sketches[i]};
      }
    }
  }
  return buckets;
}

Projection::Projection(const GradientBatch& batch, float* out, int threads)
    : x_(batch),
      out_(out),
      threads_(threads),
      kernels_(kernels_in_force()),
      of_element_(kernels_.of_element[static_cast<int>(batch.element)]),
      padded_p_(round_up(batch.p, kernels_.columns)) {}

int64_t Projection::block_for_threads(int64_t size, int64_t block, int64_t parts) const {
  const int64_t tasks = threads_ == 1 ? 0 : round_up(4 * threads_, parts) / parts, least = block / 4;
  while (block > least && size < tasks * block) block /= 2;
  return block;
}

void Projection::write(int64_t example, int64_t row, const float* strip, bool add) const {
  for (int64_t i = row; i < std::min(row + kernels_.rows, x_.q); ++i, strip += padded_p_) {
    float* to = out_ + (example * x_.q + i) * x_.p;
    for (int64_t j = 0; j < x_.p; ++j) to[j] = add ? to[j] + strip[j] : strip[j];
  }
}

ScaledProjection::ScaledProjection(const GradientBatch& batch, float* out, int threads, int64_t tasks_of_part)
    : Projection(batch, out, threads), padded_in_(round_up(batch.in_features, kernels_.columns)) {
  const int64_t parts_of_wave = round_up(4 * threads_, tasks_of_part) / tasks_of_part;
  for (int64_t example = 0; example < x_.batch; ++example) {
    const int64_t start = x_.offsets[example], end = x_.offsets[example + 1];
    for (int64_t begin = start; begin < end; begin += kPieceTokens) {
      const int64_t index = pieces_.size(), part = parts_.size();
      pieces_.push_back({example, begin, std::min(kPieceTokens, end - begin), begin == start});
      if (!parts_.empty() && begin == start && parts_.back().size() < kPartPieces &&
          rows_of({parts_.back().begin, index + 1}) <= kPartRows) {
        ++parts_.back().end;
        continue;
      }
      parts_.push_back({index, index + 1});
      if (!waves_.empty() && begin == start && waves_.back().size() < parts_of_wave) {
        ++waves_.back().end;
      } else {
        waves_.push_back({part, part + 1});
      }
    }
  }
}

void ScaledProjection::pack_columns(int64_t piece, int64_t column, const Range& run,
                                    const Buffer& columns) const {
  const auto& [example, begin, tokens, first] = pieces_[piece];
  of_element_.pack_b(at(x_.activations, begin * x_.in_features + column), x_.in_features, tokens,
                     std::min(kColumnBlock, x_.in_features - column),
                     packed_columns(piece, column, run, columns), kernels_.columns * (tokens + 1));
}

int64_t ScaledProjection::most_rows() const {
  int64_t rows = 0;
  for (const Range& wave : waves_) rows = std::max(rows, rows_of(pieces_of(wave)));
  return rows;
}

int64_t ScaledProjection::most_pieces() const {
  int64_t pieces = 0;
  for (const Range& wave : waves_) pieces = std::max(pieces, pieces_of(wave).size());
  return pieces;
}

void project_gradients(const GradientBatch& batch, float* out, int threads) {
  std::fill_n(out, batch.batch * batch.q * batch.p, 0.0f);
  if (batch.rank == 0 || batch.in_features == 0 || batch.out_features == 0) return;  // an empty sum
  if (batch.q == 0 || batch.p == 0) return;
  Scratch::of_this_thread().rewind();
  if (!batch.scale) return project_folded(batch, out, threads);
  const std::vector<Bucket> buckets = buckets_of(batch.left, batch.rank, batch.q, batch.out_features,
                                                 round_up(batch.out_features, kRowBlock));
  if (buckets.empty()) return project_dense(batch, out, threads);
  project_countsketch(batch, buckets, out, threads);
}

}  // namespace trackstar
