#include "cpu/table_kernel.h"

#if defined(__AVX2__)  // otherwise there is nothing to be had

#include "cpu/simd.h"

namespace trackstar {
namespace TRACKSTAR_ISA {
namespace {

constexpr int kCentre = 128;  // added to sums, so that bytes are not negative
constexpr int kRange = 125;   // of sums before rounding, which adds up to 2
constexpr int kLookups = 8;   // of a word

typedef int8_t Entries __attribute__((vector_size(16)));

// All sums ± a ± b ± c ± d, where bit i of the index negates the i-th.
inline Entries sums_of(const int8_t* numbers) {
  constexpr Entries kNegate[4] = {
      {0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1},
      {0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1},
      {0, 0, 0, 0, -1, -1, -1, -1, 0, 0, 0, 0, -1, -1, -1, -1},
      {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1},
  };
  Entries sums = {};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) sums += (numbers[i] ^ kNegate[i]) - kNegate[i];
  return sums;
}

float tabulate(const float* values, size_t d, uint8_t* tables, double* squares) {
  float largest = 0;  // Σ |values| of four
  for (size_t i = 0; i < d; i += 4) {
    float size = 0;
    for (size_t j = i; j < d && j < i + 4; ++j) size += __builtin_fabsf(values[j]);
    largest = size > largest ? size : largest;
  }
  const float scale = largest / kRange;
  double square = 0, lost = 0;
  for (size_t word = 0; word < d; word += 32, tables += kWordTables) {
    int8_t numbers[32] = {};
    for (size_t j = 0; j < 32 && word + j < d; ++j) {
      const float value = values[word + j];
      float rounded = 0;
      if (scale > 0) {
        rounded = value / scale;
        rounded = rounded < -kRange ? -kRange : rounded > kRange ? kRange : rounded;
        rounded = (rounded + 0x1.8p23f) - 0x1.8p23f;  // to the nearest whole number
      }
      numbers[j] = static_cast<int8_t>(rounded);
      const double rest = value - static_cast<double>(scale) * rounded;
      square += static_cast<double>(value) * value;
      lost += rest < 0 ? -rest : rest;
    }
    for (int i = 0; i < kLookups; ++i) {
      // Of each byte the low numbers come first: 4 tables for them, 4 for the high ones.
      const Entries sums = sums_of(numbers + 4 * i);
      uint8_t* table = tables + (i % 2 * 4 + i / 2) * 16;
      for (int j = 0; j < 16; ++j) table[j] = static_cast<uint8_t>(sums[j] + kCentre);
    }
  }
  squares[0] += square;
  squares[1] += lost * lost / static_cast<double>(d);
  return scale;
}

constexpr int kGroup = 16;  // rows that share an index vector
constexpr int kGroups = kTableRows / kGroup;

#if defined(__AVX512VBMI__)

// Masked forms of what needs no mask, as the plain ones draw a false warning from gcc 12.
constexpr __mmask16 kAll = 0xFFFF;
constexpr __mmask8 kAll64 = 0xFF;

// 16 words of 16 rows become, for each word, a vector of its rows.
inline void transpose(__m512i* v) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_maskz_unpacklo_epi32(kAll, v[i], v[i + 1]);
    t[i + 1] = _mm512_maskz_unpackhi_epi32(kAll, v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_maskz_unpacklo_epi64(kAll64, t[i], t[i + 2]);
    v[i + 1] = _mm512_maskz_unpackhi_epi64(kAll64, t[i], t[i + 2]);
    v[i + 2] = _mm512_maskz_unpacklo_epi64(kAll64, t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_maskz_unpackhi_epi64(kAll64, t[i + 1], t[i + 3]);
  }
  // v[4 i + j] holds words j, j + 4, j + 8, j + 12 of rows 4 i … 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_maskz_shuffle_i32x4(kAll, v[j], v[4 + j], 0x88);
    t[4 + j] = _mm512_maskz_shuffle_i32x4(kAll, v[j], v[4 + j], 0xDD);
    t[8 + j] = _mm512_maskz_shuffle_i32x4(kAll, v[8 + j], v[12 + j], 0x88);
    t[12 + j] = _mm512_maskz_shuffle_i32x4(kAll, v[8 + j], v[12 + j], 0xDD);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    v[j] = _mm512_maskz_shuffle_i32x4(kAll, t[j], t[8 + j], 0x88);
    v[4 + j] = _mm512_maskz_shuffle_i32x4(kAll, t[4 + j], t[12 + j], 0x88);
    v[8 + j] = _mm512_maskz_shuffle_i32x4(kAll, t[j], t[8 + j], 0xDD);
    v[12 + j] = _mm512_maskz_shuffle_i32x4(kAll, t[4 + j], t[12 + j], 0xDD);
  }
}

// Numbers stay in their words, four to a 32-bit lane of a row; bits 4 and 5 of an index choose the table.
void index(const uint32_t* const* rows, size_t words, size_t ahead, uint8_t* indices) {
  const __m512i low = _mm512_set1_epi8(15), table = _mm512_set1_epi32(0x30201000);
  for (size_t word = 0; word < words; word += 16) {
    const size_t count = words - word < 16 ? words - word : 16;
    const __mmask16 some = static_cast<__mmask16>((1u << count) - 1);
    for (int group = 0; group < kGroups; ++group) {
      __m512i v[16];
#pragma GCC unroll 16
      for (int r = 0; r < kGroup; ++r) {
        const uint32_t* row = rows[group * kGroup + r] + word;
        __builtin_prefetch(reinterpret_cast<const char*>(row) + ahead);
        v[r] = _mm512_maskz_loadu_epi32(some, row);
      }
      transpose(v);
      uint8_t* to = indices + word * kWordIndices + group * 64;
#pragma GCC unroll 16
      for (size_t w = 0; w < 16; ++w, to += kWordIndices) {
        if (w == count) break;
        // (x & 15) | table, of the low and of the high numbers
        _mm512_storeu_si512(to, _mm512_ternarylogic_epi32(v[w], low, table, 0xEA));
        _mm512_storeu_si512(
            to + kWordIndices / 2,
            _mm512_ternarylogic_epi32(_mm512_maskz_srli_epi32(kAll, v[w], 4), low, table, 0xEA));
      }
    }
  }
}

template <int kQueries>
void run(const uint8_t* indices, size_t words, const uint8_t* tables, size_t table_stride,
         const float* scales, const float* query_scales, float* scores, size_t score_stride) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum[kQueries][2][kGroups];
#pragma GCC unroll 2
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int group = 0; group < kGroups; ++group) {
      sum[q][0][group] = _mm512_set1_epi32(-kCentre * kLookups * static_cast<int>(words));
      sum[q][1][group] = _mm512_setzero_si512();
    }
  }
  for (size_t word = 0; word < words; ++word, indices += kWordIndices, tables += kWordTables) {
    __m512i table[kQueries][2];
#pragma GCC unroll 2
    for (int q = 0; q < kQueries; ++q) {
      table[q][0] = _mm512_loadu_si512(tables + q * table_stride);
      table[q][1] = _mm512_loadu_si512(tables + q * table_stride + 64);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
      for (int group = 0; group < kGroups; ++group) {
        const __m512i which = _mm512_loadu_si512(indices + half * kWordIndices / 2 + group * 64);
#pragma GCC unroll 2
        for (int q = 0; q < kQueries; ++q) {
          const __m512i found = _mm512_maskz_permutexvar_epi8(~uint64_t{0}, which, table[q][half]);
          sum[q][half][group] = _mm512_dpbusd_epi32(sum[q][half][group], found, ones);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int group = 0; group < kGroups; ++group) {
      typedef int32_t Sums __attribute__((vector_size(64)));
      const Sums total = (Sums)sum[q][0][group] + (Sums)sum[q][1][group];
      float* score = scores + q * score_stride + group * kGroup;
      const Vec weight = query_scales[q] * load(scales + group * kGroup);
      store(score, load(score) + weight * __builtin_convertvector(total, Vec));
    }
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

// Each byte of a word goes to a half vector of its own, with that of 16 rows: two vectors of low numbers, then two
// of high ones.
void index(const uint32_t* const* rows, size_t words, size_t ahead, uint8_t* indices) {
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i by_byte = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12,
                                           1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (size_t word = 0; word < words; word += 8) {
    const size_t count = words - word < 8 ? words - word : 8;
    for (int group = 0; group < kGroups; ++group) {
      __m256i a[8], b[8];  // rows 0 … 3 and 8 … 11; rows 4 … 7 and 12 … 15
      for (int r = 0; r < 8; ++r) {
        const int even = group * kGroup + r % 4 + r / 4 * 8;
        __builtin_prefetch(reinterpret_cast<const char*>(rows[even] + word) + ahead);
        __builtin_prefetch(reinterpret_cast<const char*>(rows[even + 4] + word) + ahead);
        a[r] = load_words(rows[even] + word, count);
        b[r] = load_words(rows[even + 4] + word, count);
      }
      transpose(a);
      transpose(b);
      uint8_t* to = indices + word * kWordIndices + group * 128;
      for (size_t w = 0; w < count; ++w, to += kWordIndices) {
        const __m256i first = _mm256_shuffle_epi8(a[w], by_byte), second = _mm256_shuffle_epi8(b[w], by_byte);
        const __m256i bytes[2] = {
            _mm256_permute4x64_epi64(_mm256_unpacklo_epi32(first, second), 0xD8),
            _mm256_permute4x64_epi64(_mm256_unpackhi_epi32(first, second), 0xD8),
        };
        for (int i = 0; i < 2; ++i) {
          auto* half = reinterpret_cast<__m256i*>(to + 32 * i);
          _mm256_storeu_si256(half, _mm256_and_si256(bytes[i], low));
          _mm256_storeu_si256(half + 2, _mm256_and_si256(_mm256_srli_epi16(bytes[i], 4), low));
        }
      }
    }
  }
}

// One query; bytes are summed in 16 bits, all of a pair in one sum and the high one of it in another.
void run_one(const uint8_t* indices, size_t words, const uint8_t* tables, const float* scales,
             float query_scale, float* scores) {
  constexpr size_t kRun = 64;  // words whose sums of bytes fit 16 bits
  for (size_t first = 0; first < words; first += kRun) {
    const size_t count = words - first < kRun ? words - first : kRun;
    __m256i all[kGroups] = {}, high[kGroups] = {};
    for (size_t word = 0; word < count; ++word, indices += kWordIndices, tables += kWordTables) {
      __m256i table[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        table[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tables + 32 * i));
      }
#pragma GCC unroll 4
      for (int group = 0; group < kGroups; ++group) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const auto* which = reinterpret_cast<const __m256i*>(indices + group * 128 + 32 * i);
          const __m256i found = _mm256_shuffle_epi8(table[i], _mm256_loadu_si256(which));
          all[group] = _mm256_add_epi16(all[group], found);
          high[group] = _mm256_add_epi16(high[group], _mm256_srli_epi16(found, 8));
        }
      }
    }
    const int32_t start = -kCentre * kLookups * static_cast<int>(count);
    for (int group = 0; group < kGroups; ++group) {
      const __m256i even = _mm256_sub_epi16(all[group], _mm256_slli_epi16(high[group], 8));
      const __m256i rows[2] = {_mm256_unpacklo_epi16(even, high[group]),
                               _mm256_unpackhi_epi16(even, high[group])};
      for (int i = 0; i < 2; ++i) {
        typedef int32_t Sums __attribute__((vector_size(32)));
        const Sums total = (Sums)_mm256_cvtepu16_epi32(_mm256_castsi256_si128(rows[i])) +
                           (Sums)_mm256_cvtepu16_epi32(_mm256_extracti128_si256(rows[i], 1)) + start;
        const size_t r = group * kGroup + i * 8;
        const Vec weight = query_scale * load(scales + r);
        store(scores + r, load(scores + r) + weight * __builtin_convertvector(total, Vec));
      }
    }
  }
}

template <int kQueries>
void run(const uint8_t* indices, size_t words, const uint8_t* tables, size_t table_stride,
         const float* scales, const float* query_scales, float* scores, size_t score_stride) {
  for (int q = 0; q < kQueries; ++q) {
    run_one(indices, words, tables + q * table_stride, scales, query_scales[q], scores + q * score_stride);
  }
}

#endif

}  // namespace

const TableKernels table_kernels = {index, tabulate, {run<1>, run<2>}};

}  // namespace TRACKSTAR_ISA
}  // namespace trackstar

#endif
