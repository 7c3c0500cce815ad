#include "cpu/table_kernel.h"

#if defined(__AVX2__)  // otherwise there is nothing to be had

#include "cpu/fetch.h"
#include "cpu/simd.h"

namespace trackstar {
namespace TRACKSTAR_ISA {
namespace {

constexpr int kCentre = 128;  // added to sums, so that bytes are not negative
constexpr int kRange = 127;   // of sums
constexpr int kLookups = 8;   // of a word
constexpr int kVectorRows = 16;

typedef double Entries __attribute__((vector_size(64)));
typedef int32_t Numbers __attribute__((vector_size(32)));
typedef uint8_t Eight __attribute__((vector_size(8), aligned(1), may_alias));

// Where the tables of `kWordsTogether` words have that of a word's lookup i: the low numbers of its first byte, the high
// ones, those of its second byte, and so on.
#if defined(__AVX512VBMI__)
// Word by word, of each first 4 for the low numbers and then 4 for the high ones.
constexpr size_t table_of(size_t word, int i) { return word * kWordTables + (i % 2 * 4 + i / 2) * 16; }
#else
// Byte by byte, with each of the first 16 the one that lies 16 bytes on.
constexpr size_t table_of(size_t word, int i) {
  const size_t byte = 4 * word + i / 2;
  return (byte % 16 * 2 + i % 2) * 32 + byte / 16 * 16;
}
#endif

// Sums ± a ± b ± c + d, where bit i of the index negates the i-th. Those with -d are the same in reverse, negated.
inline Entries sums_of(const float* four) {
  constexpr Entries kSigns[3] = {
      {1, -1, 1, -1, 1, -1, 1, -1}, {1, 1, -1, -1, 1, 1, -1, -1}, {1, 1, 1, 1, -1, -1, -1, -1}};
  return kSigns[0] * four[0] + kSigns[1] * four[1] + kSigns[2] * four[2] + four[3];
}

inline double largest_of(Entries sizes) {
  const auto larger = [](Entries a, Entries b) { return a > b ? a : b; };
  sizes = larger(sizes, __builtin_shufflevector(sizes, sizes, 4, 5, 6, 7, 0, 1, 2, 3));
  sizes = larger(sizes, __builtin_shufflevector(sizes, sizes, 2, 3, 0, 1, 6, 7, 4, 5));
  return sizes[0] > sizes[1] ? sizes[0] : sizes[1];
}

float tabulate(const float* values, size_t d, uint8_t* tables, double* squares) {
  constexpr double kMagic = 0x1.8p52;  // of which whole numbers are the last bits
  float largest = 0;                   // Σ |values| of four
  double square = 0;
  for (size_t i = 0; i < d; i += 4) {
    float size = 0;
    for (size_t j = i; j < d && j < i + 4; ++j) {
      size += __builtin_fabsf(values[j]);
      square += static_cast<double>(values[j]) * values[j];
    }
    largest = size > largest ? size : largest;
  }
  const float scale = largest / kRange;
  const double unit = scale > 0 ? 1.0 / scale : 0;
  double lost = 0;
  const size_t words = table_bytes((d + 31) / 32) / kWordTables;
  for (size_t word = 0; word < words; ++word) {
    uint8_t* together = tables + word / kWordsTogether * kWordsTogether * kWordTables;
    for (int i = 0; i < kLookups; ++i) {
      float four[4] = {};
      for (size_t j = 0, from = 32 * word + 4 * i; j < 4 && from + j < d; ++j) four[j] = values[from + j];
      const Entries sums = sums_of(four);
      Entries rounded = (sums * unit + kMagic) - kMagic;
      rounded = rounded < -kRange ? Entries{} - kRange : rounded > kRange ? Entries{} + kRange : rounded;
      const Entries rest = sums - rounded * static_cast<double>(scale);
      const Numbers whole = __builtin_convertvector(rounded, Numbers);
      const Numbers reversed = __builtin_shufflevector(whole, whole, 7, 6, 5, 4, 3, 2, 1, 0);
      uint8_t* table = together + table_of(word % kWordsTogether, i);
      *reinterpret_cast<Eight*>(table) = __builtin_convertvector(kCentre + whole, Eight);
      *reinterpret_cast<Eight*>(table + 8) = __builtin_convertvector(kCentre - reversed, Eight);
      lost += largest_of(rest < 0 ? -rest : rest);
    }
  }
  squares[0] += square;
  squares[1] += lost * lost / static_cast<double>(d);
  return scale;
}

#if defined(__AVX512VBMI__)

// Masked forms of what needs no mask, as the plain ones draw a false warning from gcc 12.
constexpr __mmask16 kAll = 0xFFFF;
constexpr __mmask8 kAll64 = 0xFF;

// `count` words of all rows, at most kWordsTogether, become for each word a vector of the rows.
inline void load_words(const uint32_t* const* rows, size_t word, size_t count, __m512i* v) {
  __m512i t[kWordsTogether];
  const __mmask8 some = static_cast<__mmask8>((1u << count) - 1);
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    // Rows 0 … 3 each with the fourth after it, and 8 … 11.
    const uint32_t* const* pair = rows + r % 4 + r / 4 * 8;
    v[r] = _mm512_maskz_inserti64x4(kAll64,
                                    _mm512_castsi256_si512(_mm256_maskz_loadu_epi32(some, pair[0] + word)),
                                    _mm256_maskz_loadu_epi32(some, pair[4] + word), 1);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_maskz_unpacklo_epi32(kAll, v[i], v[i + 1]);
    t[i + 1] = _mm512_maskz_unpackhi_epi32(kAll, v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm512_maskz_unpacklo_epi64(kAll64, t[i], t[i + 2]);
    v[i + 1] = _mm512_maskz_unpackhi_epi64(kAll64, t[i], t[i + 2]);
    v[i + 2] = _mm512_maskz_unpacklo_epi64(kAll64, t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_maskz_unpackhi_epi64(kAll64, t[i + 1], t[i + 3]);
  }
  // v[i] and v[4 + i] hold words i and i + 4 of rows 0 … 3 and 4 … 7, and of rows 8 … 11 and 12 … 15.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_maskz_shuffle_i32x4(kAll, v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_maskz_shuffle_i32x4(kAll, v[i], v[4 + i], 0xDD);
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < kWordsTogether; ++i) v[i] = t[i];
}

// Numbers stay in their words, four to a 32-bit lane of a row; bits 4 and 5 of an index choose the table.
template <int kQueries>
__attribute__((noinline)) void look_up(const TableRows& rows, size_t r, const TableQueries& queries,
                                       size_t q0, SpreadNear& ahead, float* scores) {
  const size_t words = rows.words;
  const uint8_t* tables = queries.tables + q0 * queries.stride;
  const __m512i low = _mm512_set1_epi8(15), place = _mm512_set1_epi32(0x30201000), ones = _mm512_set1_epi8(1);
  __m512i sum[kQueries][2];  // of low and of high numbers
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
    sum[q][0] = _mm512_set1_epi32(-kCentre * kLookups * static_cast<int>(words));
    sum[q][1] = _mm512_setzero_si512();
  }
  for (size_t first = 0; first < words; first += kWordsTogether) {
    const size_t count = words - first < kWordsTogether ? words - first : kWordsTogether;
    __m512i v[kWordsTogether];
    ahead.next();
    load_words(rows.rows + r, rows.word + first, count, v);
#pragma GCC unroll 8
    for (size_t w = 0; w < kWordsTogether; ++w, tables += kWordTables) {
      if (w == count) break;
      // (x & 15) | place, of the low and of the high numbers
      const __m512i which[2] = {
          _mm512_ternarylogic_epi32(v[w], low, place, 0xEA),
          _mm512_ternarylogic_epi32(_mm512_maskz_srli_epi32(kAll, v[w], 4), low, place, 0xEA),
      };
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m512i table = _mm512_loadu_si512(tables + q * queries.stride + half * 64);
          const __m512i found = _mm512_maskz_permutexvar_epi8(~uint64_t{0}, which[half], table);
          sum[q][half] = _mm512_dpbusd_epi32(sum[q][half], found, ones);
        }
      }
    }
  }
  const Vec scale = load(rows.scales + r);
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
    typedef int32_t Sums __attribute__((vector_size(64)));
    const Sums total = (Sums)sum[q][0] + (Sums)sum[q][1];
    float* score = scores + (q0 + q) * kTableRows + r;
    store(score, load(score) + queries.scales[q0 + q] * scale * __builtin_convertvector(total, Vec));
  }
}

// The tables of a few queries stay in the first-level cache while they are looked up for all rows.
void run(const TableRows& rows, const TableQueries& queries, const FetchLines& fetch, float* scores) {
  constexpr size_t kMost = 4;
  constexpr decltype(&look_up<1>) kForms[kMost] = {look_up<1>, look_up<2>, look_up<3>, look_up<4>};
  const size_t groups = (queries.count + kMost - 1) / kMost,
               vectors = (rows.count + kVectorRows - 1) / kVectorRows;
  // The first-level cache has room for most of the next rows as well: one or two queries take 0.8 to 0.9 of the time they
  // take with those in the second (Zen 5).
  SpreadNear ahead(fetch, groups * vectors * (table_bytes(rows.words) / table_bytes(1)));
  for (size_t q = 0; q < queries.count; q += kMost) {
    const auto form = kForms[(queries.count - q < kMost ? queries.count - q : kMost) - 1];
    for (size_t r = 0; r < rows.count; r += kVectorRows) form(rows, r, queries, q, ahead, scores);
  }
}

#else

inline __m256i load_words(const uint32_t* from, size_t count) {
  if (count == kWordsTogether) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  uint32_t words[kWordsTogether] = {};
  for (size_t i = 0; i < count; ++i) words[i] = from[i];
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
}

// 32 bytes of eight rows become the rows' bytes 2i and then their bytes 2i + 1, in v[i], i < 8, each half of the vectors by
// itself.
inline void transpose(__m256i* v) {
  __m256i t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_unpacklo_epi8(v[i], v[i + 4]);
    t[i + 4] = _mm256_unpackhi_epi8(v[i], v[i + 4]);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 8; half += 4) {
#pragma GCC unroll 2
    for (int i = half; i < half + 2; ++i) {
      v[i] = _mm256_unpacklo_epi8(t[i], t[i + 2]);
      v[i + 2] = _mm256_unpackhi_epi8(t[i], t[i + 2]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi8(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi8(v[i], v[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = t[i];
}

constexpr size_t kIndices = kTableWords * kLookups * kVectorRows;  // bytes, of kVectorRows rows

// A vector for each table vector: the numbers below 16 that look up what rows r … r + 15 have there.
void index(const TableRows& rows, size_t r, Spread& ahead, uint8_t* indices) {
  const __m256i low = _mm256_set1_epi8(15);
  auto* to = reinterpret_cast<__m256i*>(indices);
  for (size_t first = 0; first < rows.words; first += kWordsTogether) {
    const size_t count = rows.words - first < kWordsTogether ? rows.words - first : kWordsTogether;
    ahead.next();
    __m256i half[2][8];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        half[h][i] = load_words(rows.rows[r + 8 * h + i] + rows.word + first, count);
      }
      transpose(half[h]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m256i pair[2] = {_mm256_unpacklo_epi64(half[0][i], half[1][i]),
                               _mm256_unpackhi_epi64(half[0][i], half[1][i])};
#pragma GCC unroll 2
      for (const __m256i bytes : pair) {
        _mm256_store_si256(to++, _mm256_and_si256(bytes, low));
        _mm256_store_si256(to++, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
      }
    }
  }
}

// Sums of 16 rows; bytes are summed in 16 bits, all of a pair in one sum and the high one of it in another.
struct RowSums {
  __m256i all = {}, high = {};

  void add(__m256i table, __m256i which) {
    const __m256i found = _mm256_shuffle_epi8(table, which);
    all = _mm256_add_epi16(all, found);
    high = _mm256_add_epi16(high, _mm256_srli_epi16(found, 8));
  }

  // scores += query_scale · scales · (start + sums)
  void finish(int32_t start, const float* scales, float query_scale, float* scores) const {
    const __m256i even = _mm256_sub_epi16(all, _mm256_slli_epi16(high, 8));
    const __m128i evens = _mm_add_epi16(_mm256_castsi256_si128(even), _mm256_extracti128_si256(even, 1)),
                  odds = _mm_add_epi16(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    const __m128i rows[2] = {_mm_unpacklo_epi16(evens, odds), _mm_unpackhi_epi16(evens, odds)};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      typedef int32_t Sums __attribute__((vector_size(32)));
      const Sums total = (Sums)_mm256_cvtepu16_epi32(rows[i]) + start;
      const Vec weight = query_scale * load(scales + i * 8);
      store(scores + i * 8, load(scores + i * 8) + weight * __builtin_convertvector(total, Vec));
    }
  }
};

constexpr int kVectors = 2;  // of rows, for which an entry is loaded once

// Query q and rows r … r + 16 · kVectors - 1.
inline void look_up(const uint8_t* indices, const TableRows& rows, size_t r, const TableQueries& queries,
                    size_t q, float* scores) {
  static_assert(255 * kLookups * kTableWords <= 65535);
  const size_t vectors = table_bytes(rows.words) / 32;
  const auto *which = reinterpret_cast<const __m256i*>(indices),
             *table = reinterpret_cast<const __m256i*>(queries.tables + q * queries.stride);
  RowSums sums[kVectors];
  for (size_t i = 0; i < vectors; i += 2) {
#pragma GCC unroll 2
    for (size_t j = i; j < i + 2; ++j) {
      const __m256i entries = _mm256_loadu_si256(table + j);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        sums[v].add(entries, _mm256_load_si256(which + v * kIndices / 32 + j));
    }
  }
  const int32_t start = -kCentre * static_cast<int>(2 * vectors);
  scores += q * kTableRows + r;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    sums[v].finish(start, rows.scales + r + v * kVectorRows, queries.scales[q], scores + v * kVectorRows);
  }
}

// All rows' indices, and a query's tables, stay in the first-level cache while they are used.
void run(const TableRows& rows, const TableQueries& queries, const FetchLines& fetch, float* scores) {
  constexpr size_t kStep = kVectors * kVectorRows;
  alignas(32) uint8_t indices[kTableRows / kVectorRows][kIndices];
  const size_t steps = (rows.count + kStep - 1) / kStep, together = table_bytes(rows.words) / table_bytes(1);
  Spread ahead(fetch, steps * (kVectors * together + queries.count));
  for (size_t v = 0; v < steps * kVectors; ++v) index(rows, v * kVectorRows, ahead, indices[v]);
  for (size_t q = 0; q < queries.count; ++q) {
    for (size_t step = 0; step < steps; ++step) {
      ahead.next();
      look_up(indices[step * kVectors], rows, step * kStep, queries, q, scores);
    }
  }
}

#endif

}  // namespace

const TableKernels table_kernels = {tabulate, run};

}  // namespace TRACKSTAR_ISA
}  // namespace trackstar

#endif
