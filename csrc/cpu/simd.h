// The float vector of the instruction set level that a micro-kernel source is compiled for.
//
// For *_kernel.cpp only: everything is in an unnamed namespace, so that no level's code can stand in for
// another's.
#pragma once

#include <stddef.h>

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

inline Vec load(const float* from) { return *reinterpret_cast<const UnalignedVec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<UnalignedVec*>(to) = value; }
inline Vec splat(float value) { return value - Vec{}; }

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
