// The float vector of the instruction set level that a micro-kernel source is compiled for.
//
// For *_kernel.cpp only: everything is in an unnamed namespace, so that no level's code can stand in for
// another's.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <stddef.h>

#include "cpu/narrow.h"

namespace trackstar::TRACKSTAR_ISA {
namespace {

#if defined(__AVX512F__)
constexpr ptrdiff_t kLanes = 16;
#elif defined(__AVX__)
constexpr ptrdiff_t kLanes = 8;
#else
constexpr ptrdiff_t kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef float UnalignedVec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t NarrowBits __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(2), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const UnalignedVec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<UnalignedVec*>(to) = value; }
inline Vec splat(float value) { return value - Vec{}; }

// Narrow numbers are widened as they are loaded, which is exact.
inline Bits load_bits(const void* from) {
  return __builtin_convertvector(*static_cast<const NarrowBits*>(from), Bits);
}

inline Vec load(const Bfloat16* from) { return (Vec)(load_bits(from) << 16); }

inline Vec load(const Half* from) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_maskz_cvtph_ps(0xFFFF, bits);  // the plain form draws a false warning from gcc 12
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits)));
#else
  const Bits half = load_bits(from);
  // Exponent and mantissa moved into place make a float 2^112 too small, subnormals included. The exponent
  // of infinities and NaNs, all ones, is put back by hand.
  const Vec magnitude = (Vec)((half & 0x7FFF) << 13) * 0x1p112f;
  const Bits special = (Bits)((half & 0x7C00) == 0x7C00) & 0x7F800000;
  return (Vec)((Bits)magnitude | special | (half & 0x8000) << 16);
#endif
}

// Widens n numbers into `to`.
template <typename T>
inline void widen(const T* from, ptrdiff_t n, float* to) {
  ptrdiff_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) {
    T tail[kLanes] = {};
    for (ptrdiff_t j = 0; i + j < n; ++j) tail[j] = from[i + j];
    const Vec wide = load(tail);
    for (ptrdiff_t j = 0; i + j < n; ++j) to[i + j] = wide[j];
  }
}

// Holds `value` in a register: the compiler may not load it again, or fold the load into each use.
inline void hold(Vec& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  (void)value;
#endif
}

}  // namespace
}  // namespace trackstar::TRACKSTAR_ISA
