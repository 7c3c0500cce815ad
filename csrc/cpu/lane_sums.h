// Sums over the lanes of vectors, in one order everywhere. For *_kernel.cpp only.
#pragma once

#include "cpu/simd.h"

namespace trackstar::TRACKSTAR_ISA {
namespace {

#if defined(__AVX512F__)
#define TRACKSTAR_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define TRACKSTAR_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX__)
#define TRACKSTAR_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define TRACKSTAR_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define TRACKSTAR_EVEN 0, 2, 4, 6
#define TRACKSTAR_ODD 1, 3, 5, 7
#endif

// The sums of neighbouring lanes: first those of a, then those of b.
inline Vec fold(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, TRACKSTAR_EVEN) + __builtin_shufflevector(a, b, TRACKSTAR_ODD);
}

// One query's products with a row are added vector by vector to so many sums in turn, for additions not to wait for one
// another.
constexpr int kTurns = 4;

inline Vec add_turns(const Vec* sums) { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }

// Each vector's sum over its lanes, in neighbouring pairs, pairs of pairs, and so on.
template <int kCount>
inline void sum_lanes(const Vec* vectors, float* sums) {
  Vec folded[kCount];
#pragma GCC unroll 24
  for (int i = 0; i < kCount; ++i) folded[i] = vectors[i];
  int count = kCount;
#pragma GCC unroll 4
  for (int width = kLanes; width > 1; width /= 2) {
#pragma GCC unroll 12
    for (int i = 0; i < count; i += 2) folded[i / 2] = fold(folded[i], folded[i + 1 < count ? i + 1 : i]);
    count = (count + 1) / 2;
  }
  constexpr int kFull = (kCount + kLanes - 1) / kLanes;  // vectors that are left
  alignas(64) float lanes[kFull * kLanes];
  for (int i = 0; i < kFull; ++i) store(lanes + i * kLanes, folded[i]);
  for (int i = 0; i < kCount; ++i) sums[i] = lanes[i];
}

}  // namespace
}  // namespace trackstar::TRACKSTAR_ISA
