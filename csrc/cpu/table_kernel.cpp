#include "cpu/table_kernel.h"

#if defined(__AVX2__)  // otherwise there is nothing to be had

#include "cpu/simd.h"

namespace trackstar {
namespace TRACKSTAR_ISA {
namespace {

constexpr int kCentre = 128;  // added to sums, so that bytes are not negative
constexpr int kRange = 127;   // of sums
constexpr int kLookups = 8;   // of a word

typedef double Entries __attribute__((vector_size(64)));
typedef int32_t Numbers __attribute__((vector_size(32)));
typedef uint8_t Eight __attribute__((vector_size(8), aligned(1), may_alias));

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
  for (size_t word = 0; word < d; word += 32, tables += kWordTables) {
    for (int i = 0; i < kLookups; ++i) {
      float four[4] = {};
      for (size_t j = 0, from = word + 4 * i; j < 4 && from + j < d; ++j) four[j] = values[from + j];
      const Entries sums = sums_of(four);
      Entries rounded = (sums * unit + kMagic) - kMagic;
      rounded = rounded < -kRange ? Entries{} - kRange : rounded > kRange ? Entries{} + kRange : rounded;
      const Entries rest = sums - rounded * static_cast<double>(scale);
      // Of each byte the low numbers come first: 4 tables for them, 4 for the high ones.
      uint8_t* table = tables + (i % 2 * 4 + i / 2) * 16;
      const Numbers whole = __builtin_convertvector(rounded, Numbers);
      const Numbers reversed = __builtin_shufflevector(whole, whole, 7, 6, 5, 4, 3, 2, 1, 0);
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

constexpr size_t kStep = 8;  // words of a row that are loaded at once

// `count` words of all rows, at most kStep, become for each word a vector of the rows.
inline void load_words(const uint32_t* const* rows, size_t word, size_t count, __m512i* v) {
  __m512i t[kStep];
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
  for (size_t i = 0; i < kStep; ++i) v[i] = t[i];
}

// Numbers stay in their words, four to a 32-bit lane of a row; bits 4 and 5 of an index choose the table.
template <int kQueries>
__attribute__((noinline)) void run(const uint32_t* const* rows, size_t word, size_t words,
                                   const uint8_t* tables, size_t table_stride, const float* scales,
                                   const float* query_scales, float* scores, size_t score_stride) {
  const __m512i low = _mm512_set1_epi8(15), place = _mm512_set1_epi32(0x30201000), ones = _mm512_set1_epi8(1);
  __m512i sum[kQueries][2];  // of low and of high numbers
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
    sum[q][0] = _mm512_set1_epi32(-kCentre * kLookups * static_cast<int>(words));
    sum[q][1] = _mm512_setzero_si512();
  }
  for (size_t first = 0; first < words; first += kStep) {
    const size_t count = words - first < kStep ? words - first : kStep;
    __m512i v[kStep];
    load_words(rows, word + first, count, v);
#pragma GCC unroll 8
    for (size_t w = 0; w < kStep; ++w, tables += kWordTables) {
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
          const __m512i table = _mm512_loadu_si512(tables + q * table_stride + half * 64);
          const __m512i found = _mm512_maskz_permutexvar_epi8(~uint64_t{0}, which[half], table);
          sum[q][half] = _mm512_dpbusd_epi32(sum[q][half], found, ones);
        }
      }
    }
  }
  const Vec scale = load(scales);
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
    typedef int32_t Sums __attribute__((vector_size(64)));
    const Sums total = (Sums)sum[q][0] + (Sums)sum[q][1];
    float* score = scores + q * score_stride;
    store(score, load(score) + query_scales[q] * scale * __builtin_convertvector(total, Vec));
  }
}

#else

inline __m256i load_words(const uint32_t* from, size_t count) {
  if (count == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  uint32_t words[8] = {};
  for (size_t i = 0; i < count; ++i) words[i] = from[i];
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
}

// 8 words of 8 rows become, for each word, a vector of its rows.
inline void transpose(__m256i* v) {
  __m256i t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(v[i], v[4 + i], 0x20);
    t[4 + i] = _mm256_permute2x128_si256(v[i], v[4 + i], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = t[i];
}

constexpr size_t kWordIndices = 8 * kTableRows;  // bytes: 8 numbers below 16 of each row's word

// Each byte of a word goes to a half vector of its own, with that of all rows: two vectors of low numbers, then two
// of high ones.
void index(const uint32_t* const* rows, size_t first, size_t words, uint8_t* indices) {
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i by_byte = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12,
                                           1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (size_t word = 0; word < words; word += 8) {
    const size_t count = words - word < 8 ? words - word : 8;
    __m256i a[8], b[8];  // rows 0 … 3 and 8 … 11; rows 4 … 7 and 12 … 15
    for (int r = 0; r < 8; ++r) {
      const uint32_t* const* even = rows + r % 4 + r / 4 * 8;
      a[r] = load_words(even[0] + first + word, count);
      b[r] = load_words(even[4] + first + word, count);
    }
    transpose(a);
    transpose(b);
    for (size_t w = 0; w < count; ++w, indices += kWordIndices) {
      const __m256i first = _mm256_shuffle_epi8(a[w], by_byte), second = _mm256_shuffle_epi8(b[w], by_byte);
      const __m256i bytes[2] = {
          _mm256_permute4x64_epi64(_mm256_unpacklo_epi32(first, second), 0xD8),
          _mm256_permute4x64_epi64(_mm256_unpackhi_epi32(first, second), 0xD8),
      };
      for (int i = 0; i < 2; ++i) {
        auto* half = reinterpret_cast<__m256i*>(indices + 32 * i);
        _mm256_storeu_si256(half, _mm256_and_si256(bytes[i], low));
        _mm256_storeu_si256(half + 2, _mm256_and_si256(_mm256_srli_epi16(bytes[i], 4), low));
      }
    }
  }
}

// One query; bytes are summed in 16 bits, all of a pair in one sum and the high one of it in another.
void run_one(const uint8_t* indices, size_t words, const uint8_t* tables, const float* scales,
             float query_scale, float* scores) {
  static_assert(255 * 2 * kLookups * kTableWords <= 65535);
  __m256i all = {}, high = {};
  for (size_t word = 0; word < words; ++word, indices += kWordIndices, tables += kWordTables) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto* which = reinterpret_cast<const __m256i*>(indices + 32 * i);
      const auto* table = reinterpret_cast<const __m256i*>(tables + 32 * i);
      const __m256i found = _mm256_shuffle_epi8(_mm256_loadu_si256(table), _mm256_loadu_si256(which));
      all = _mm256_add_epi16(all, found);
      high = _mm256_add_epi16(high, _mm256_srli_epi16(found, 8));
    }
  }
  const int32_t start = -kCentre * kLookups * static_cast<int>(words);
  const __m256i even = _mm256_sub_epi16(all, _mm256_slli_epi16(high, 8));
  const __m256i rows[2] = {_mm256_unpacklo_epi16(even, high), _mm256_unpackhi_epi16(even, high)};
  for (int i = 0; i < 2; ++i) {
    typedef int32_t Sums __attribute__((vector_size(32)));
    const Sums total = (Sums)_mm256_cvtepu16_epi32(_mm256_castsi256_si128(rows[i])) +
                       (Sums)_mm256_cvtepu16_epi32(_mm256_extracti128_si256(rows[i], 1)) + start;
    const Vec weight = query_scale * load(scales + i * 8);
    store(scores + i * 8, load(scores + i * 8) + weight * __builtin_convertvector(total, Vec));
  }
}

template <int kQueries>
void run(const uint32_t* const* rows, size_t word, size_t words, const uint8_t* tables, size_t table_stride,
         const float* scales, const float* query_scales, float* scores, size_t score_stride) {
  uint8_t indices[kTableWords * kWordIndices];
  index(rows, word, words, indices);
  for (int q = 0; q < kQueries; ++q) {
    run_one(indices, words, tables + q * table_stride, scales, query_scales[q], scores + q * score_stride);
  }
}

#endif

}  // namespace

const TableKernels table_kernels = {tabulate, {run<1>, run<2>, run<3>, run<4>}};

}  // namespace TRACKSTAR_ISA
}  // namespace trackstar

#endif
