#include "cpu/trellis_kernel.h"

#include "cpu/code_layout.h"
#include "cpu/simd.h"

namespace trackstar {
namespace TRACKSTAR_ISA {
namespace {

// trackstar_kernels/encode/_trellis.py says what is computed. It is rounded alike, so that the codes are the same: no
// product is part of a multiply-add.

constexpr int kPlaces = 8;  // levels of a subset

typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

struct Subsets {
  float levels[4][kPlaces], middles[4][kPlaces - 1];
};

constexpr Subsets subsets() {
  Subsets all{};
  for (int s = 0; s < 4; ++s) {
    for (int i = 0; i < kPlaces; ++i) all.levels[s][i] = static_cast<float>(int4_level(4 * i + s));
    for (int i = 0; i + 1 < kPlaces; ++i) all.middles[s][i] = (all.levels[s][i] + all.levels[s][i + 1]) / 2;
  }
  return all;
}

constexpr Subsets kSubsets = subsets();
constexpr float kUnit = 16 * int4_level(31);  // the largest multiplier and level

inline Ints splat(int32_t value) { return value - Ints{}; }

// Element i of every group, in units of the levels.
inline Vec scaled(const float* values, size_t i, Vec to_levels) {
  Vec value = load(values + i * kLanes) * to_levels;
  hold(value);
  return value;
}

// How far the nearest level of a subset is, squared.
inline Vec loss(Vec value, int subset) {
  const float *levels = kSubsets.levels[subset], *middles = kSubsets.middles[subset];
  Vec nearest = splat(levels[0]);
#pragma GCC unroll 8
  for (int i = 0; i + 1 < kPlaces; ++i) nearest = value > splat(middles[i]) ? splat(levels[i + 1]) : nearest;
  Vec squared = (nearest - value) * (nearest - value);
  hold(squared);
  return squared;
}

// Its place in the subset.
inline Ints place(Vec value, int subset) {
  Ints place = {};
#pragma GCC unroll 8
  for (int i = 0; i + 1 < kPlaces; ++i) place -= value > splat(kSubsets.middles[subset][i]);
  return place;
}

// What the best paths lose, and where they end. Bit s of forgotten[i] is the older bit of the state before state s.
inline Vec forward(const float* values, Ints used, Vec to_levels, Ints* forgotten, Ints* ends) {
  const Vec infinite = splat(__builtin_inff());
  Vec lost[4] = {Vec{}, infinite, infinite, infinite};
  for (size_t i = 0; i < kInt4Group; ++i) {
    const Vec value = scaled(values, i, to_levels);
    const Ints counts = splat(static_cast<int32_t>(i)) < used;
    Vec losses[4], next[4];
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) losses[s] = counts ? loss(value, s) : Vec{};
    Ints bits = {};
#pragma GCC unroll 4
    for (int state = 0; state < 4; ++state) {
      const int last = state >> 1, b = state & 1;
      const Vec from_0 = lost[last] + losses[last + 2 * b],
                from_1 = lost[2 + last] + losses[last + 2 * (1 - b)];
      const Ints other = from_1 < from_0;
      next[state] = other ? from_1 : from_0;
      bits |= other & splat(1 << state);
    }
    forgotten[i] = bits;
    for (int s = 0; s < 4; ++s) lost[s] = next[s];
  }
  Vec least = lost[0];
  *ends = Ints{};
  for (int s = 1; s < 4; ++s) {
    const Ints less = lost[s] < least;
    least = less ? lost[s] : least;
    *ends = less ? splat(s) : *ends;
  }
  return least;
}

void run(const float* values, const int32_t* used, int32_t* codes, int32_t* multipliers) {
  Vec largest = {};
  for (size_t i = 0; i < kInt4Group; ++i) {
    const Vec value = load(values + i * kLanes), size = value < 0 ? -value : value;
    largest = size > largest ? size : largest;
  }
  const Vec exact = largest * 16;
  const Ints whole = __builtin_convertvector(exact, Ints);
  const Ints fitting = whole - (__builtin_convertvector(whole, Vec) < exact);
  Ints counts;
  __builtin_memcpy(&counts, used, sizeof(counts));

  Vec least = {}, to_levels = {};
  Ints forgotten[kInt4Group], states = {}, multiplier = {};
  for (int tried = 0; tried < 3; ++tried) {
    Ints m = fitting + splat(1 - tried);
    m = m < 1 ? splat(1) : m > 16 ? splat(16) : m;
    const Vec factor = __builtin_convertvector(m, Vec), unit = 1 / factor * kUnit;
    Ints bits[kInt4Group], ends;
    const Vec lost = forward(values, counts, unit, bits, &ends) * (factor * factor);
    const Ints better = tried == 0 ? splat(-1) : lost < least;
    least = better ? lost : least;
    to_levels = better ? unit : to_levels;
    multiplier = better ? m : multiplier;
    states = better ? ends : states;
    for (size_t i = 0; i < kInt4Group; ++i) forgotten[i] = better ? bits[i] : forgotten[i];
  }
  __builtin_memcpy(multipliers, &multiplier, sizeof(multiplier));

  for (size_t i = kInt4Group; i-- > 0;) {
    const Ints bit = states & 1, last = states >> 1, other = forgotten[i] >> states & 1;
    const Ints subset = last + 2 * (bit ^ other);
    const Vec value = scaled(values, i, to_levels);
    Ints at = {};
    for (int s = 0; s < 4; ++s) at = subset == s ? place(value, s) : at;
    const Ints code = 2 * at + bit;
    __builtin_memcpy(codes + i * kLanes, &code, sizeof(code));
    states = 2 * other + last;
  }
}

}  // namespace

extern const TrellisKernel trellis_kernel = {kLanes, run};

}  // namespace TRACKSTAR_ISA
}  // namespace trackstar
