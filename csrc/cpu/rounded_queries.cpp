#include "cpu/rounded_queries.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/isa.h"
#include "cpu/round_up.h"

namespace trackstar {
namespace {

// So many queries are multiplied with codes as they lie; more are worth expanding rows for.
size_t most_few() {
  // On Ice Lake six to eight take 0.7 to 0.9 of the time, on Zen 5 and with AMX's tiles they do not.
  const bool longer = is_intel() && (isa() == Isa::v4_vnni || isa() == Isa::v4_bf16);
  return longer ? kMaxFewQueries : 5;
}

}  // namespace

RoundedQueries::RoundedQueries(const float* queries, size_t Q, size_t L, size_t d, const CodeKernels& code,
                               const CodedKernels& kernels, size_t exact_roundings)
    : kernels(kernels),
      L(L),
      d(d),
      padded(round_up(d, code.elements)),
      chunks((padded + kChunk - 1) / kChunk),
      bounds(Q),
      rests{Aligned<int8_t>(Q * L * padded), {}, std::vector<float>(Q * L), ScoreBounds(Q)} {
  const size_t lanes = kernels.lanes, bytes = 4 * lanes;
  const size_t pieces = (d + kMaxPiece - 1) / kMaxPiece;
  rests.starts.resize(Q * L * pieces * lanes);
  if (Q <= most_few()) {
    few = {Aligned<int8_t>(L * Q * padded), std::vector<int32_t>(L * pieces * Q * lanes),
           std::vector<float>(L * Q)};
    width = Q;
  } else {
    for (size_t first = 0; first < Q; first += panels.back().kernel->queries) {
      const CodedPanelKernel& kernel =
          Q - first <= static_cast<size_t>(kernels.narrow.queries) ? kernels.narrow : kernels.wide;
      const size_t count = kernel.queries;
      panels.push_back({first, &kernel, Aligned<int8_t>(L * padded * count),
                        std::vector<int32_t>(L * chunks * count), std::vector<float>(L * count)});
    }
    width = panels.back().first + panels.back().kernel->queries;
  }

  // In the order of a row's bytes.
  const auto order = [&](const std::vector<int8_t>& plain, int8_t* ordered) {
    if (code.elements == bytes) {
      std::copy(plain.begin(), plain.end(), ordered);
      return;
    }
    for (size_t i = 0; i < padded; i += code.elements) {
      for (size_t j = 0; j < code.elements / 2; ++j) {
        ordered[i + j] = plain[i + 2 * j];
        ordered[i + code.elements / 2 + j] = plain[i + 2 * j + 1];
      }
    }
  };
  // starts (pieces, …, lanes) of a block's codes, `stride` from one piece to the next.
  const auto start = [&](const int8_t* codes, int32_t* starts, size_t stride) {
    for (size_t i = 0; i < padded; i += bytes, codes += bytes) {
      int32_t* of_piece = starts + i / kMaxPiece * stride;
      for (size_t lane = 0; lane < lanes; ++lane) {
        const int8_t* four = codes + 4 * lane;
        of_piece[lane] -= code.bias * (four[0] + four[1] + four[2] + four[3]);
      }
    }
  };
  std::vector<int8_t> plain(padded), ordered(padded);
  std::vector<float> rest(d);
  for (size_t q = 0; q < Q; ++q) {
    double squares[2] = {}, rest_squares[2] = {};
    for (size_t b = 0; b < L; ++b) {
      const float* values = queries + (q * L + b) * d;
      const float unit = kernels.round(values, d, plain.data(), squares), scale = code.sign * unit;
      order(plain, ordered.data());
      for (size_t i = 0; i < d; ++i) rest[i] = values[i] - unit * static_cast<float>(plain[i]);
      rests.scales[q * L + b] = code.sign * kernels.round(rest.data(), d, plain.data(), rest_squares);
      int8_t* rest_codes = rests.codes.data() + (q * L + b) * padded;
      order(plain, rest_codes);
      start(rest_codes, rests.starts.data() + (q * L + b) * pieces * lanes, lanes);
      if (panels.empty()) {
        const size_t at = b * Q + q;
        few.scales[at] = scale;
        std::copy(ordered.begin(), ordered.end(), few.codes.begin() + static_cast<ptrdiff_t>(at * padded));
        start(ordered.data(), few.starts.data() + (b * pieces * Q + q) * lanes, Q * lanes);
      } else {
        const auto after =
            std::upper_bound(panels.begin(), panels.end(), q,
                             [](size_t query, const Panel& panel) { return query < panel.first; });
        Panel& panel = *(after - 1);
        const size_t count = panel.kernel->queries, at = q - panel.first;
        panel.scales[b * count + at] = scale;
        for (size_t i = 0; i < padded; i += 4) {
          std::memcpy(&panel.codes[(b * padded + i) * count + 4 * at], &ordered[i], 4);
        }
        for (size_t chunk = 0; chunk < chunks; ++chunk) {
          const auto begin = ordered.begin() + static_cast<ptrdiff_t>(chunk * kChunk);
          const auto end = ordered.begin() + static_cast<ptrdiff_t>(std::min(padded, (chunk + 1) * kChunk));
          panel.starts[(b * chunks + chunk) * count + at] = -code.bias * std::accumulate(begin, end, 0);
        }
      }
    }
    const size_t roundings = L * std::max(pieces, chunks) + lanes;
    bounds.set(q, squares[0], squares[1], exact_roundings + roundings + 16);
    rests.bounds.set(q, squares[0], rest_squares[1], exact_roundings + 2 * roundings + 16);
  }
}

size_t RoundedQueries::tile_rows(size_t fit) const {
  constexpr size_t kTileBytes = 256 << 10, kTileRows = 64;
  if (panels.empty()) return std::min(fit, kTileRows);
  const size_t step = panels.front().kernel->rows;
  return std::max(std::min({fit, kTileBytes / (L * padded), kTileRows}) / step * step, step);
}

RoundedQueries::Fetching RoundedQueries::fetch(const Rows& rows, size_t row, size_t count) const {
  const bool woven = is_woven(rows);
  const size_t ahead = woven ? kWovenBytes : 16 << 10;  // bytes
  Fetching fetching;
  // Rows of floats that are fetched from several pages at once take 0.88 of the time so on Ice Lake, codes 1.1.
  if (panels.front().kernel->fetches && (is_coded(rows.type) || !woven)) {
    fetching.multiplying.open(rows, row + count, count);
  } else {
    fetching.making.open(rows, row + 1 + ahead / (rows.L * block_bytes(rows.type, rows.d)), count);
  }
  return fetching;
}

void RoundedQueries::multiply(const Tile& tile, Ahead& ahead, Aligned<float>& scores) const {
  const size_t step = panels.front().kernel->rows;
  const size_t calls = L * chunks * panels.size() * ((tile.count + step - 1) / step);
  const size_t lines = ahead.share(calls);
  std::fill(scores.begin(), scores.end(), 0.0f);
  kernels.begin();
  for (size_t b = 0; b < L; ++b) {
    for (size_t chunk = 0; chunk < chunks; ++chunk) {
      const size_t from = b * padded + chunk * kChunk, depth = std::min(kChunk, padded - chunk * kChunk);
      for (const Panel& panel : panels) {
        const size_t count = panel.kernel->queries;
        for (size_t r = 0; r < tile.count; r += step) {
          panel.kernel->run(tile.bytes + r * tile.stride + from, tile.stride,
                            panel.codes.data() + from * count, depth, ahead.take(lines),
                            panel.starts.data() + (b * chunks + chunk) * count,
                            tile.scales + b * tile.rows + r, panel.scales.data() + b * count,
                            scores.data() + r * width + panel.first, width);
        }
      }
    }
  }
  kernels.end();
}

}  // namespace trackstar
