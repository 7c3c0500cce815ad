// Vectors of whole numbers of the instruction set level that a micro-kernel source is compiled for: simd.h for
// bytes. For *_kernel.cpp only.
#pragma once

#include "cpu/simd.h"

namespace trackstar::TRACKSTAR_ISA {
namespace {

constexpr ptrdiff_t kBytes = 4 * kLanes;

typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
typedef uint8_t UnalignedBytes __attribute__((vector_size(kBytes), aligned(1), may_alias));
typedef int32_t Sums __attribute__((vector_size(kBytes)));
typedef int32_t UnalignedSums __attribute__((vector_size(kBytes), aligned(4), may_alias));

inline void copy(const uint8_t* from, size_t n, uint8_t* to) {
  for (size_t i = 0; i < n; ++i) to[i] = from[i];
}

inline Bytes load_bytes(const void* from) { return *static_cast<const UnalignedBytes*>(from); }
inline void store_bytes(void* to, Bytes value) { *static_cast<UnalignedBytes*>(to) = value; }
inline Sums load_sums(const int32_t* from) { return *reinterpret_cast<const UnalignedSums*>(from); }
inline Bytes splat_byte(uint8_t value) { return value - Bytes{}; }

// The four bytes at `from`, in every lane.
inline Bytes splat_four(const uint8_t* from) {
  typedef int32_t Unaligned __attribute__((aligned(1), may_alias));
  return (Bytes)(*reinterpret_cast<const Unaligned*>(from) - Sums{});
}

inline Vec to_floats(Sums sums) { return __builtin_convertvector(sums, Vec); }

// A quarter of a vector: kLanes signed bytes.
typedef int8_t Quarter __attribute__((vector_size(kLanes)));
typedef int8_t UnalignedQuarter __attribute__((vector_size(kLanes), aligned(1), may_alias));

// Masked forms, here and below, as the plain ones draw a false warning from gcc 12.
inline Vec to_floats(Quarter quarter) {
#if defined(__AVX512F__)
  return to_floats((Sums)_mm512_maskz_cvtepi8_epi32(0xFFFF, (__m128i)quarter));
#elif defined(__AVX2__)
  typedef int8_t Sixteen __attribute__((vector_size(16)));
  const Sixteen padded = {quarter[0], quarter[1], quarter[2], quarter[3],
                          quarter[4], quarter[5], quarter[6], quarter[7]};
  return to_floats((Sums)_mm256_cvtepi8_epi32((__m128i)padded));
#else
  return to_floats(__builtin_convertvector(quarter, Sums));
#endif
}

// Stores the lowest byte of each lane. (The general form becomes one instruction a byte.)
inline void store_low_bytes(uint8_t* to, Sums sums) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xFFFF, (__m512i)sums);
  __builtin_memcpy(to, &bytes, kLanes);
#elif defined(__AVX2__)
  const __m256i lowest = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                          -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i apart = _mm256_shuffle_epi8((__m256i)sums, lowest);
  const __m128i bytes = _mm_or_si128(_mm256_castsi256_si128(apart), _mm256_extracti128_si256(apart, 1));
  __builtin_memcpy(to, &bytes, kLanes);
#else
  for (ptrdiff_t lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<uint8_t>(sums[lane]);
#endif
}

// The largest magnitude of the signed factors of dot4.
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
constexpr int kTop = 64;  // so that a pair of products, 2 · 255 · 64, fits 16 bits
#else
constexpr int kTop = 127;
#endif

// sums[i] + Σ_j a[4i + j] · b[4i + j], j < 4: a from 0 to 255, b from -kTop to kTop. Wraps around.
inline Sums dot4(Sums sums, Bytes a, Bytes b) {
#if defined(__AVX512VNNI__)
  return (Sums)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
  return (Sums)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#elif defined(__AVX512BW__)
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)a, (__m512i)b);
  return sums + (Sums)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
  return sums + (Sums)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  typedef uint32_t Words __attribute__((vector_size(kBytes)));
  Words total = (Words)sums;
  for (int j = 0; j < 4; ++j) {
    const Words factor = (Words)a >> 8 * j & 255,
                signed_factor = (Words)((Sums)((Words)b << (24 - 8 * j)) >> 24);
    total += factor * signed_factor;
  }
  return (Sums)total;
#endif
}

// 16 bytes from each of several places, one after another.
inline Bytes load_sixteens(const uint8_t* const* from) {
#if defined(__AVX2__)
  const auto sixteen = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i])); };
#endif
#if defined(__AVX512BW__)
  __m512i all = _mm512_castsi128_si512(sixteen(0));
  all = _mm512_inserti32x4(all, sixteen(1), 1);
  all = _mm512_inserti32x4(all, sixteen(2), 2);
  return (Bytes)_mm512_inserti32x4(all, sixteen(3), 3);
#elif defined(__AVX2__)
  return (Bytes)_mm256_inserti128_si256(_mm256_castsi128_si256(sixteen(0)), sixteen(1), 1);
#else
  return load_bytes(from[0]);
#endif
}

// 16 bytes from each of several places and, to[1], the 16 behind them.
inline void load_thirty_twos(const uint8_t* const* from, Bytes* to) {
#if defined(__AVX512BW__)
  const auto two = [&](int i) {
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from[i]));
    return _mm512_maskz_inserti64x4(0xFF, _mm512_castsi256_si512(first),
                                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from[i + 1])), 1);
  };
  const __m512i low = two(0), high = two(2);
  to[0] = (Bytes)_mm512_maskz_shuffle_i64x2(0xFF, low, high, 0x88);
  to[1] = (Bytes)_mm512_maskz_shuffle_i64x2(0xFF, low, high, 0xDD);
#else
  const uint8_t* behind[kBytes / 16];
  for (int i = 0; i < kBytes / 16; ++i) behind[i] = from[i] + 16;
  to[0] = load_sixteens(from);
  to[1] = load_sixteens(behind);
#endif
}

// Every 16 bytes of `tables` at the places that the same 16 of `indices` say, all of them below 16.
inline Bytes look_up(Bytes tables, Bytes indices) {
#if defined(__AVX512BW__)
  return (Bytes)_mm512_shuffle_epi8((__m512i)tables, (__m512i)indices);
#elif defined(__AVX2__)
  return (Bytes)_mm256_shuffle_epi8((__m256i)tables, (__m256i)indices);
#elif defined(__aarch64__)
  return (Bytes)vqtbl1q_u8((uint8x16_t)tables, (uint8x16_t)indices);
#else
  Bytes found;
  for (ptrdiff_t i = 0; i < kBytes; ++i) found[i] = tables[indices[i]];
  return found;
#endif
}

// The same of two tables, the second where `bit` of `flags` is set.
template <int bit>
inline Bytes look_up(const Bytes* tables, Bytes flags, Bytes indices) {
#if defined(__AVX512BW__)
  const __mmask64 second = _mm512_test_epi8_mask((__m512i)flags, _mm512_set1_epi8(1 << bit));
  return (Bytes)_mm512_mask_shuffle_epi8((__m512i)look_up(tables[0], indices), second, (__m512i)tables[1],
                                         (__m512i)indices);
#elif defined(__AVX2__)
  const __m256i second = _mm256_slli_epi16((__m256i)flags, 7 - bit);  // its highest bit counts
  return (Bytes)_mm256_blendv_epi8((__m256i)look_up(tables[0], indices), (__m256i)look_up(tables[1], indices),
                                   second);
#elif defined(__aarch64__)
  const uint8x16x2_t both = {{(uint8x16_t)tables[0], (uint8x16_t)tables[1]}};
  return (Bytes)vqtbl2q_u8(both, (uint8x16_t)((flags >> bit & 1) << 4 | indices));
#else
  const Bytes second = -(flags >> bit & 1);
  return (look_up(tables[0], indices) & ~second) | (look_up(tables[1], indices) & second);
#endif
}

// Every 16 bytes moved up by one, behind a zero.
inline Bytes bytes_before(Bytes bytes) {
#if defined(__AVX512BW__)
  return (Bytes)_mm512_bslli_epi128((__m512i)bytes, 1);
#elif defined(__AVX2__)
  return (Bytes)_mm256_slli_si256((__m256i)bytes, 1);
#else
  return __builtin_shufflevector(Bytes{}, bytes, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29,
                                 30);
#endif
}

// tables[flag][n] for kLanes numbers n of four bits, two a byte, the first one in the low bits, and their flags, the
// lowest bits of the same in `flags`.
inline Quarter look_up_pairs(const uint8_t (*tables)[16], uint64_t numbers, uint64_t flags) {
#if defined(__AVX2__)
  // A byte becomes the two bytes of a 16-bit number.
  const auto nibbles = [](uint64_t bytes) {
    const __m128i both = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
    return _mm_and_si128(_mm_or_si128(both, _mm_slli_epi16(both, 4)), _mm_set1_epi16(0x0F0F));
  };
  const auto table = [&](int i) { return _mm_load_si128(reinterpret_cast<const __m128i*>(tables[i])); };
  const __m128i places = nibbles(numbers), second = _mm_slli_epi16(nibbles(flags), 7);
  const __m128i found =
      _mm_blendv_epi8(_mm_shuffle_epi8(table(0), places), _mm_shuffle_epi8(table(1), places), second);
  Quarter quarter;
  __builtin_memcpy(&quarter, &found, sizeof(quarter));
  return quarter;
#else
  Quarter quarter;
  for (ptrdiff_t i = 0; i < kLanes; ++i) {
    quarter[i] = static_cast<int8_t>(tables[flags >> 4 * i & 1][numbers >> 4 * i & 15]);
  }
  return quarter;
#endif
}

// Magnitudes of signed bytes.
inline Bytes magnitudes(Bytes value) {
#if defined(__AVX512BW__)
  return (Bytes)_mm512_maskz_abs_epi8(~uint64_t{0}, (__m512i)value);
#elif defined(__AVX2__)
  return (Bytes)_mm256_abs_epi8((__m256i)value);
#else
  typedef int8_t Signed __attribute__((vector_size(kBytes)));
  const Bytes negative = (Bytes)((Signed)value < 0);
  return (value ^ negative) - negative;
#endif
}

// 2 where a bit of the kBytes bits at `from` is set, from the lowest on, and 0 elsewhere.
inline Bytes twice_bits(const uint8_t* from) {
#if defined(__AVX512BW__)
  typedef uint64_t Unaligned __attribute__((aligned(1), may_alias));
  return (Bytes)_mm512_maskz_set1_epi8(*reinterpret_cast<const Unaligned*>(from), 2);
#elif defined(__AVX2__)
  const __m256i words = (__m256i)splat_four(from);
  const __m256i which = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(words, which), bit), bit);
  return (Bytes)_mm256_and_si256(set, _mm256_set1_epi8(2));
#else
  Bytes bytes;
  for (ptrdiff_t i = 0; i < kBytes; ++i) bytes[i] = from[i / 8] >> i % 8 << 1 & 2;
  return bytes;
#endif
}

inline int32_t sum_of(Sums sums) {
#if defined(__AVX512F__)
  const auto eight = __builtin_shufflevector(sums, sums, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(sums, sums, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto four =
      __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return four[0] + four[1] + (four[2] + four[3]);
#else
  int32_t total = 0;
  for (ptrdiff_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
  return total;
#endif
}

inline int32_t largest_of(Sums sums) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const auto low = __builtin_shufflevector(sums, sums, 0, 1, 2, 3, 4, 5, 6, 7),
             high = __builtin_shufflevector(sums, sums, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m256i eight = _mm256_max_epi32((__m256i)low, (__m256i)high);
#else
  const __m256i eight = (__m256i)sums;
#endif
  __m128i most = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4E));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xB1));
  return _mm_cvtsi128_si32(most);
#else
  int32_t most = sums[0];
  for (ptrdiff_t lane = 1; lane < kLanes; ++lane) most = most > sums[lane] ? most : sums[lane];
  return most;
#endif
}

// From the first lane to the last.
inline float sum_of(Vec values) {
  float total = 0;
  for (ptrdiff_t lane = 0; lane < kLanes; ++lane) total += values[lane];
  return total;
}

}  // namespace
}  // namespace trackstar::TRACKSTAR_ISA
