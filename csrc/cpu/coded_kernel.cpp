#include "cpu/coded_kernel.h"

#include "cpu/code_simd.h"
#include "cpu/fetch.h"
#include "cpu/lane_sums.h"
#include "cpu/rounding_simd.h"

namespace trackstar {
namespace TRACKSTAR_ISA {
namespace {

template <typename Codes>
constexpr size_t kElements = Codes::vectors * kBytes;  // of a step
template <typename Codes>
constexpr size_t kStep = Codes::bytes(kElements<Codes>);  // bytes of a row that it reads

// Calls use(codes, i) for every step of elements from … end - 1; behind the last codes of a block are zeros.
template <typename Codes, typename Use>
inline void for_steps(const uint8_t* codes, size_t from, size_t end, Use use) {
  constexpr size_t kEvery = kElements<Codes>;
  size_t i = from;
#pragma GCC unroll 4
  for (; i + kEvery <= end; i += kEvery) use(codes + Codes::bytes(i), i);
  if (i < end) {
    uint8_t tail[kStep<Codes>] = {};
    copy(codes + Codes::bytes(i), Codes::bytes(end - i), tail);
    use(tail, i);
  }
}

// ---- Few queries: vectors along one row after another, which is what memory is best at --------------------

template <typename Codes, int kQueries>
inline void add_products(const uint8_t* row, const int8_t* queries, size_t query_stride, Sums* sum) {
  Bytes bytes[Codes::vectors];
  Codes::load(row, bytes);
#pragma GCC unroll 2
  for (int v = 0; v < Codes::vectors; ++v) {
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      sum[q] = dot4(sum[q], bytes[v], load_bytes(queries + q * query_stride + v * kBytes));
    }
  }
}

template <typename Codes, int kQueries>
__attribute__((noinline)) void few(const uint8_t* row, const float* scales, size_t block_bytes,
                                   const FewQueries& queries, float* scores) {
  constexpr size_t kEvery = kElements<Codes>;
  const size_t d = queries.d, padded = (d + kEvery - 1) / kEvery * kEvery;
  const int8_t* codes = queries.codes;
  const int32_t* starts = queries.starts;
  const float* query_scales = queries.scales;
  fetch_pages(row, queries.L * block_bytes);
  Vec total[kQueries] = {};
  for (size_t b = 0; b < queries.L; ++b) {
    for (size_t piece = 0; piece < d; piece += kMaxPiece) {
      const size_t end = d < piece + kMaxPiece ? d : piece + kMaxPiece;
      Sums sum[kQueries];
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) sum[q] = load_sums(starts + q * kLanes);
      starts += kQueries * kLanes;
      for_steps<Codes>(row, piece, end, [&](const uint8_t* from, size_t i) __attribute__((always_inline)) {
        fetch_ahead(from, queries.woven);
        add_products<Codes, kQueries>(from, codes + i, padded, sum);
      });
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) {
        total[q] += to_floats(sum[q]) * splat(query_scales[q] * scales[b]);
      }
    }
    row += block_bytes;
    codes += kQueries * padded;
    query_scales += kQueries;
  }
  sum_lanes<kQueries>(total, scores);
}

// ---- Whole rows -------------------------------------------------------------------------------------------

// sums + codes², from bytes
template <typename Codes>
inline Sums add_squares(Sums sums, const Bytes* bytes) {
  const Bytes most = splat_byte(127);
  for (int v = 0; v < Codes::vectors; ++v) {
    const Bytes code = magnitudes(bytes[v] - splat_byte(Codes::bias));
    sums = dot4(sums, code, code < most ? code : most);  // -128 counts as -127 · 128
  }
  return sums;
}

template <typename Codes, bool kExpand>
double measure(const uint8_t* row, size_t block_bytes, const float* scales, size_t L, size_t d,
               const FetchLines& fetch, uint8_t* bytes) {
  constexpr size_t kEvery = kElements<Codes>;
  fetch_pages(fetch.from, fetch.lines * kLineBytes);
  Spread ahead(fetch, L * ((d + kEvery - 1) / kEvery));
  double total = 0;
  for (size_t b = 0; b < L; ++b, row += block_bytes) {
    int64_t square = Codes::bias == 1 ? static_cast<int64_t>(d) : 0;
    for (size_t piece = 0; piece < d; piece += kMaxPiece) {
      const size_t end = d < piece + kMaxPiece ? d : piece + kMaxPiece;
      Sums sums = {};
      for_steps<Codes>(row, piece, end, [&](const uint8_t* from, size_t i) {
        Bytes out[Codes::vectors];
        Codes::load(from, out);
        if (end - i < kEvery) Codes::clear_behind(end - i, out);
        if constexpr (kExpand) {
          ahead.next();
          for (int v = 0; v < Codes::vectors; ++v) store_bytes(bytes + i + v * kBytes, out[v]);
        }
        if constexpr (Codes::bias != 1) sums = add_squares<Codes>(sums, out);
      });
      square += sum_of(sums);
    }
    if constexpr (kExpand) bytes += (d + kEvery - 1) / kEvery * kEvery;
    total += static_cast<double>(scales[b]) * scales[b] * static_cast<double>(square);
  }
  return total;
}

template <typename Codes>
double expand(const uint8_t* row, size_t block_bytes, const float* scales, size_t L, size_t d,
              const FetchLines& fetch, uint8_t* bytes) {
  return measure<Codes, true>(row, block_bytes, scales, L, d, fetch, bytes);
}

template <typename Codes>
double square(const uint8_t* row, size_t block_bytes, const float* scales, size_t L, size_t d) {
  return measure<Codes, false>(row, block_bytes, scales, L, d, {nullptr, 0, false}, nullptr);
}

// The last codes of a block, from element i on; what is behind them is read as zero bits.
template <typename Codes>
inline Vec last_floats(const uint8_t* codes, size_t i, size_t d) {
  const size_t from = i / 64 * 64, start = Codes::bytes(from);  // where codes begin anew in any dtype
  uint8_t tail[Codes::bytes(64)] = {};
  copy(codes + start, Codes::bytes(d) - start, tail);
  return Codes::load_floats(tail, i - from);
}

// ---- Exact scores -----------------------------------------------------------------------------------------

// A vector of codes from element i on times values, for those whose products are rounded nowhere.
template <typename Codes>
inline Vec add_exact(Vec sum, const uint8_t* codes, size_t i, Vec values) {
  if constexpr (Codes::bias == 1)
    return sum + Codes::signed_values(values, codes, i);
  else
    return sum + Codes::load_floats(codes, i) * values;
}

template <typename Codes>
__attribute__((noinline)) void exact(const uint8_t* const* codes, const float* query, size_t d,
                                     const float* scale, float* scores) {
  const size_t whole = d / kLanes * kLanes;
  Vec turns[kExactRows][kTurns];
  for (size_t t = 0; t < kTurns; ++t) {
    Vec sum[kExactRows] = {};
    for (size_t i = t * kLanes; i < whole; i += kTurns * kLanes) {
      const Vec values = load(query + i);
#pragma GCC unroll 8
      for (int r = 0; r < kExactRows; ++r) sum[r] = add_exact<Codes>(sum[r], codes[r], i, values);
    }
    for (int r = 0; r < kExactRows; ++r) turns[r][t] = sum[r];
  }
  if (whole < d) {
    float values[kLanes] = {};
    for (size_t j = 0; whole + j < d; ++j) values[j] = query[whole + j];
    const size_t t = whole / kLanes % kTurns;
    for (int r = 0; r < kExactRows; ++r) turns[r][t] += last_floats<Codes>(codes[r], whole, d) * load(values);
  }
  Vec sum[kExactRows];
  for (int r = 0; r < kExactRows; ++r) sum[r] = add_turns(turns[r]);
  float sums[kExactRows];
  sum_lanes<kExactRows>(sum, sums);
  for (int r = 0; r < kExactRows; ++r) scores[r] += scale[r] * sums[r];
}

template <typename Codes>
void widen_codes(const uint8_t* codes, size_t d, float* out) {
  size_t i = 0;
  for (; i + kLanes <= d; i += kLanes) store(out + i, Codes::load_floats(codes, i));
  if (i < d) {
    const Vec wide = last_floats<Codes>(codes, i, d);
    for (size_t j = 0; i + j < d; ++j) out[i + j] = wide[j];
  }
}

// ---- Many queries: vectors along the queries, over rows expanded to bytes ---------------------------------

inline void add_scaled(Sums sum, float scale, const float* query_scales, float* scores) {
  store(scores, load(scores) + to_floats(sum) * (scale * load(query_scales)));
}

#if defined(__AMX_INT8__)
// In tiles of 16 rows × 64 bytes, two of which are multiplied at once.

constexpr int kTileRows = 16;
constexpr size_t kTileDepth = 64;

// Eight tiles, each of 16 rows of 64 bytes: sums are 0 to 3, rows 4 and 5, queries 6 and 7.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfiguration kTiles;

void begin() { _tile_loadconfig(&kTiles); }
void end() { _tile_release(); }

// 32 rows and kQueryTiles · 16 queries. Blocks are padded to whole tiles.
template <int kQueryTiles>
__attribute__((noinline)) void tile_panel(const uint8_t* rows, size_t row_stride, const int8_t* panel,
                                          size_t depth, const FetchLines&, const int32_t* starts,
                                          const float* scale, const float* query_scales, float* scores,
                                          size_t score_stride) {
  constexpr size_t kQueryStride = kQueryTiles * 64;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (size_t k = 0; k < depth; k += kTileDepth) {
    const int8_t* queries = panel + k * kQueryTiles * kTileRows;
    _tile_loadd(6, queries, kQueryStride);
    _tile_loadd(4, rows + k, row_stride);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(5, rows + kTileRows * row_stride + k, row_stride);
    _tile_dpbusd(1, 5, 6);
    if constexpr (kQueryTiles == 2) {
      _tile_loadd(7, queries + 64, kQueryStride);
      _tile_dpbusd(2, 4, 7);
      _tile_dpbusd(3, 5, 7);
    }
  }
  alignas(64) int32_t sums[kQueryTiles][2 * kTileRows][kLanes];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[0][kTileRows], 64);
  if constexpr (kQueryTiles == 2) {
    _tile_stored(2, sums[1], 64);
    _tile_stored(3, sums[1][kTileRows], 64);
  }
  for (int r = 0; r < 2 * kTileRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kQueryTiles; ++v) {
      add_scaled(load_sums(sums[v][r]) + load_sums(starts + v * kLanes), scale[r], query_scales + v * kLanes,
                 scores + r * score_stride + v * kLanes);
    }
  }
}

#else

void begin() {}
void end() {}

#if defined(__AVX512F__)
constexpr int kPanelRows = 12;  // two vectors of sums each: 24 of 32 registers
#elif defined(__AVXVNNI__)
constexpr int kPanelRows = 6;  // 12 of 16 registers
#else
constexpr int kPanelRows = 4;
#endif

template <int kVecs>
__attribute__((noinline)) void panel(const uint8_t* rows, size_t row_stride, const int8_t* panel,
                                     size_t depth, const FetchLines& fetch, const int32_t* starts,
                                     const float* scale, const float* query_scales, float* scores,
                                     size_t score_stride) {
  constexpr size_t kStep = 32;
  Sums sum[kPanelRows][kVecs];
#pragma GCC unroll 12
  for (int r = 0; r < kPanelRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) sum[r][v] = load_sums(starts + v * kLanes);
  }
  Spread ahead(fetch, (depth + kStep - 1) / kStep);
  for (size_t step = 0; step < depth; step += kStep) {
    ahead.next();
    const size_t end = step + kStep < depth ? step + kStep : depth;
    for (size_t k = step; k < end; k += 4) {
      Bytes query[kVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) query[v] = load_bytes(panel + (k * kVecs + 4 * v) * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < kPanelRows; ++r) {
        const Bytes four = splat_four(rows + r * row_stride + k);
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) sum[r][v] = dot4(sum[r][v], four, query[v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kPanelRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      add_scaled(sum[r][v], scale[r], query_scales + v * kLanes, scores + r * score_stride + v * kLanes);
    }
  }
}

#endif

// ---- One query and one row as bytes -------------------------------------------------------------------------

float product(const uint8_t* bytes, size_t padded, const float* scales, size_t stride,
              const FewQueries& query) {
  const int8_t* codes = query.codes;
  Vec total = {};
  for (size_t b = 0; b < query.L; ++b, bytes += padded, codes += padded) {
    Sums sums = load_sums(query.starts + b * kLanes);
#pragma GCC unroll 4
    for (size_t k = 0; k < padded; k += kBytes) {
      sums = dot4(sums, load_bytes(bytes + k), load_bytes(codes + k));
    }
    total += to_floats(sums) * splat(scales[b * stride] * query.scales[b]);
  }
  float score;
  sum_lanes<1>(&total, &score);
  return score;
}

// ---- Thresholds -------------------------------------------------------------------------------------------

// Bit i: whether lane i is not at most its limit.
inline unsigned lanes_above(Vec value, Vec limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(value, limit, _CMP_NLE_UQ);
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps(value, limit, _CMP_NLE_UQ));
#else
  unsigned lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= unsigned{!(value[i] <= limit[i])} << i;
  return lanes;
#endif
}

size_t reaching(const float* scores, float sign, size_t n, float a, const float* wide, float b,
                const float* far, const float* threshold, float* upper, uint32_t* which) {
  size_t count = 0, q = 0;
  for (; q + kLanes <= n; q += kLanes) {
    const Vec most = sign * load(scores + q) + a * load(wide + q) + b * load(far + q);
    store(upper + q, most);
    for (unsigned lanes = lanes_above(most, load(threshold + q)); lanes != 0; lanes &= lanes - 1) {
      which[count++] = static_cast<uint32_t>(q) + static_cast<uint32_t>(__builtin_ctz(lanes));
    }
  }
  for (; q < n; ++q) {
    upper[q] = sign * scores[q] + a * wide[q] + b * far[q];
    if (!(upper[q] <= threshold[q])) which[count++] = static_cast<uint32_t>(q);
  }
  return count;
}

size_t doubtful(const float* scores, size_t n, float a, const float* wide, float b, const float* far,
                const float* above, const float* below, uint32_t* which) {
  size_t count = 0, q = 0;
  for (; q + kLanes <= n; q += kLanes) {
    const Vec score = load(scores + q), margin = a * load(wide + q) + b * load(far + q);
    for (unsigned lanes =
             lanes_above(score + margin, load(above + q)) | lanes_above(load(below + q), score - margin);
         lanes != 0; lanes &= lanes - 1) {
      which[count++] = static_cast<uint32_t>(q) + static_cast<uint32_t>(__builtin_ctz(lanes));
    }
  }
  for (; q < n; ++q) {
    const float margin = a * wide[q] + b * far[q];
    if (!(scores[q] + margin <= above[q]) || !(scores[q] - margin >= below[q])) which[count++] = q;
  }
  return count;
}

template <typename Codes>
constexpr CodeKernels code_kernels() {
  return {Codes::bias,
          Codes::bias == 1 ? -1.0f : 1.0f,
          kElements<Codes>,
          {few<Codes, 1>, few<Codes, 2>, few<Codes, 3>, few<Codes, 4>, few<Codes, 5>, few<Codes, 6>,
           few<Codes, 7>, few<Codes, 8>},
          square<Codes>,
          expand<Codes>,
          exact<Codes>,
          widen_codes<Codes>};
}

template <int kVecs>
constexpr CodedPanelKernel panel_kernel() {
#if defined(__AMX_INT8__)
  return {2 * kTileRows, kVecs * kLanes, false, tile_panel<kVecs>};
#else
  return {kPanelRows, kVecs * kLanes, true, panel<kVecs>};
#endif
}

}  // namespace

const CodedKernels coded_kernels = {
    kLanes,
    kTop,
    round,
    to_bytes,
    product,
    sizes,
    code_kernels<Int8Codes>(),
    code_kernels<Int4Codes>(),
    code_kernels<SignCodes>(),
    begin,
    end,
    panel_kernel<1>(),
    panel_kernel<2>(),
    reaching,
    doubtful,
};

}  // namespace TRACKSTAR_ISA
}  // namespace trackstar
