// As much of CUDA's language as csrc/cuda uses, on the threads of simt.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt.h"

#define __global__
#define __device__
#define __launch_bounds__(...)
#define threadIdx (simt::block()->thread().index)
#define blockIdx (simt::block()->index)
#define gridDim (simt::block()->grid)

using std::isnan;
using std::max;
using std::min;

inline void __syncthreads() { simt::barrier(); }

inline void __syncwarp() {
  struct Nothing {
  } nothing;
  simt::Block& b = *simt::block();
  char* name = &b.warp_barrier[b.warp()][b.thread().warp_barriers++ % 2];
  simt::order_before(name);
  simt::together<Nothing>([](simt::Lanes<Nothing>) {}, nothing);
  simt::order_after(name);
}

namespace simt {

// Each lane's value and the lane whose value it asks for.
template <typename T>
struct Exchange {
  T value;
  int source;
  T result;
};

template <typename T>
T exchange(unsigned mask, T value, int source) {
  if (mask != ~0u) throw std::runtime_error("an operation of part of a warp");
  Exchange<T> own{value, source, {}};
  together<Exchange<T>>(
      [](Lanes<Exchange<T>> lanes) SIMT_UNSEEN {
        for (auto* lane : lanes) lane->result = lanes[lane->source]->value;
      },
      own);
  return own.result;
}

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return simt::exchange(mask, value, source & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return simt::exchange(mask, value, simt::block()->lane() ^ bits);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  const int lane = simt::block()->lane();
  return simt::exchange(mask, value, lane + distance < 32 ? lane + distance : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  struct Ballot {
    bool vote;
    unsigned result;
  } own{vote, 0};
  if (mask != ~0u) throw std::runtime_error("an operation of part of a warp");
  simt::together<Ballot>(
      [](simt::Lanes<Ballot> lanes) SIMT_UNSEEN {
        unsigned votes = 0;
        for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(lanes[i]->vote) << i;
        for (auto* lane : lanes) lane->result = votes;
      },
      own);
  return own.result;
}

template <typename T>
T atomicAdd(T* at, T value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
