// The codes of narrow rows as vectors. For *_kernel.cpp only.
#pragma once

#include "cpu/code_layout.h"
#include "cpu/integer_simd.h"

namespace trackstar::TRACKSTAR_ISA {
namespace {

// How each dtype's codes become bytes, `vectors` vectors a step, and floats, a vector from element i on. Bits behind a
// block's last code are zero; `clear_behind` makes the bytes of a step behind its first n those of the number zero.

struct Int8Codes {
  static constexpr int bias = 128, vectors = 1;
  static constexpr size_t bytes(size_t d) { return d; }
  static void load(const uint8_t* codes, Bytes* out) { out[0] = load_bytes(codes) ^ splat_byte(0x80); }
  static void clear_behind(size_t, Bytes*) {}
  static Vec load_floats(const uint8_t* codes, size_t i) {
    return to_floats((Quarter)(*reinterpret_cast<const UnalignedQuarter*>(codes + i)));
  }
};

// For every two groups of 32 elements a byte with their multipliers, and behind it 32 bytes with their codes. Of the two
// codes before a code in its group, or zeros, the last one's lowest bit chooses the set of levels, and the other's is
// added to the code's own.
struct Int4Codes {
  static constexpr int bias = 128, vectors = kBytes == 16 ? 4 : 2;
  static constexpr size_t bytes(size_t d) { return int4_bytes(d); }
  static void load(const uint8_t* codes, Bytes* out) {
    typedef uint16_t Pairs __attribute__((vector_size(kBytes)));
    constexpr int kGroups = kBytes / 16, kHalf = vectors / 2;
    const Bytes low = splat_byte(15);
#pragma GCC unroll 2
    for (int v = 0; v < kHalf; ++v) {
      const uint8_t *pairs[kGroups], *levels[kGroups];
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        const int group = v * kGroups + g;
        const uint8_t* cell = codes + group / 2 * kInt4Cell;
        pairs[g] = cell + 1 + group % 2 * 16;
        levels[g] = kInt4Levels.of[cell[0] >> group % 2 * 4 & 15][0];
      }
      const Bytes both = load_sixteens(pairs), before = bytes_before(both);
      const Bytes places = both ^ (before & splat_byte(0x11));
      Bytes sets[2];
      load_thirty_twos(levels, sets);
      out[v] = look_up<4>(sets, before, places & low);
      out[kHalf + v] = look_up<0>(sets, both, (Bytes)((Pairs)places >> 4) & low);
    }
  }
  static Vec load_floats(const uint8_t* codes, size_t i) {
    const uint8_t* cell = codes + i / 64 * kInt4Cell;
    const auto& sets = kInt4Levels.of[cell[0] >> i % 64 / 32 * 4 & 15];
    const uint8_t* pairs = cell + 1 + i % 64 / 2;
    uint64_t both = 0;
    __builtin_memcpy(&both, pairs, kLanes / 2);
    const uint64_t before = i % 32 == 0 ? 0 : pairs[-1];
    const uint64_t last = both << 4 | before >> 4, other = both << 8 | before;
    return to_floats(look_up_pairs(sets, both ^ (other & 0x1111111111111111), last) ^ -128);
  }
  static void clear_behind(size_t n, Bytes* out) {
    constexpr size_t kHalf = vectors * kBytes / 2;  // where the odd elements begin
    for (size_t i = 0; i < 2 * kHalf; ++i) {
      if (i % kHalf * 2 + i / kHalf >= n) out[i / kBytes][i % kBytes] = bias;
    }
  }
};

struct SignCodes {
  static constexpr int bias = 1, vectors = 1;
  static constexpr size_t bytes(size_t d) { return (d + 7) / 8; }
  static void load(const uint8_t* codes, Bytes* out) { out[0] = twice_bits(codes); }
  static void clear_behind(size_t, Bytes*) {}
  // Values with the signs of a vector of codes.
  static Vec signed_values(Vec values, const uint8_t* codes, size_t i) {
#if defined(__AVX512F__)
    typedef uint16_t Unaligned __attribute__((aligned(1), may_alias));
    const __mmask16 negative = *reinterpret_cast<const Unaligned*>(codes + i / 8);
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    return (Vec)_mm512_mask_xor_epi32((__m512i)values, negative, (__m512i)values, sign);
#else
    Bits place;
    for (ptrdiff_t lane = 0; lane < kLanes; ++lane) place[lane] = static_cast<uint32_t>(31 - i % 8 - lane);
    return (Vec)((Bits)values ^ (uint32_t{codes[i / 8]} << place & 0x80000000));
#endif
  }
  static Vec load_floats(const uint8_t* codes, size_t i) { return signed_values(splat(1.0f), codes, i); }
};

}  // namespace
}  // namespace trackstar::TRACKSTAR_ISA
