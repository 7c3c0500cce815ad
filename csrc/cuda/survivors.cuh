// Keeping the k best of the scores that a block sees, for each of its queries.
//
// A score passes if it is larger than the query's threshold, the k-th best so far. Positions ascend from tile to tile,
// so that one which only equals it has lost its tie. What passes becomes a key (csrc/cuda/scoring.h): integers that
// are all different and sort as results do. The lanes of a warp that have one take places in the query's reservoir
// together. When a tile might not fit any more, a warp finds the k-th best and moves what is below it out. What is
// kept does not depend on the order in which warps take places.
#pragma once

#include <cmath>

#include "cuda/device.cuh"
#include "cuda/tile.cuh"

namespace trackstar::cuda {

// Larger for better scores; all NaN are alike, as 0 and -0 are.
__device__ inline int64_t key_of(float score, uint32_t position) {
  const int bits = __float_as_int(score + 0.0f);
  const int ordered = isnan(score) ? INT32_MIN : bits < 0 ? bits ^ INT32_MAX : bits;
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(ordered)) << 32 | ~position);
}

__device__ inline float score_of(int64_t key) {
  const int ordered = static_cast<int>(key >> 32);
  return __int_as_float(ordered < 0 ? ordered ^ INT32_MAX : ordered);
}

// In shared memory.
template <int kColumns>
struct Thresholds {
  float lowest[kColumns];  // scores at or below have lost; NaN: none has
  int count[kColumns];     // keys in each reservoir
  unsigned bins[kWarps][32];
};

template <int kColumns>
class Selection {
 public:
  // Of queries first … first + kColumns - 1 and one slice.
  __device__ Selection(Thresholds<kColumns>& thresholds, const Survivors& survivors, int first, int slice)
      : thresholds_(thresholds),
        survivors_(survivors),
        first_(first),
        queries_(min(kColumns, survivors.Q - first)),
        slice_(slice) {
    for (int q = threadIdx.x; q < kColumns; q += kThreads) {
      thresholds_.lowest[q] = NAN;
      thresholds_.count[q] = 0;
    }
  }

  // Takes a tile's scores; `valid[h]`: of row lane / 4 + 8·h of the warp's, at position[h]. A barrier must lie
  // between this and what came before. All reservoirs have room for another tile when it returns.
  __device__ void offer(const Sums<kColumns>& scores, const uint32_t (&position)[2], const bool (&valid)[2]) {
#pragma unroll
    for (int c = 0; c < kColumns / 8; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int q = column_of(c, i);
        const float score = survivors_.largest ? scores[c][i] : -scores[c][i], lowest = thresholds_.lowest[q];
        append(q, score, position[i / 2], valid[i / 2] && q < queries_ && (score > lowest || isnan(lowest)));
      }
    }
    __syncthreads();
    for (int q = threadIdx.x / 32; q < queries_; q += kWarps) {
      const int count = thresholds_.count[q];
      if (count > survivors_.k && count > survivors_.capacity - kTileRows) weed(q, count);
    }
  }

  // Marks the places that no key has taken.
  __device__ void finish() {
    for (int q = threadIdx.x / 32; q < queries_; q += kWarps) {
      __syncwarp();
      int64_t* keys = reservoir(q);
      for (int i = thresholds_.count[q] + threadIdx.x % 32; i < survivors_.capacity; i += 32)
        keys[i] = kEmpty;
    }
  }

 private:
  __device__ int64_t* reservoir(int q) const {
    const size_t query = first_ + q;
    return survivors_.keys + (query * survivors_.slices + slice_) * survivors_.capacity;
  }

  // Called by whole warps; lanes that are equal modulo 4 have the same query.
  __device__ void append(int q, float score, uint32_t position, bool passes) {
    const unsigned all = __ballot_sync(~0u, passes);
    if (all == 0) return;
    const int lane = threadIdx.x % 32;
    const unsigned takers = all & 0x11111111u << lane % 4;
    const int leader = __ffs(takers) - 1;
    int begin = 0;
    if (lane == leader) begin = atomicAdd(&thresholds_.count[q], __popc(takers));
    begin = __shfl_sync(~0u, begin, takers == 0 ? lane : leader);
    if (passes) reservoir(q)[begin + __popc(takers & ((1u << lane) - 1))] = key_of(score, position);
  }

  // Leaves the k best of a query's keys, in front. Called by a whole warp.
  __device__ void weed(int q, int count) {
    int64_t* keys = reservoir(q);
    const int lane = threadIdx.x % 32;
    const int64_t lowest = kth_largest(keys, count);
    int kept = 0;
    for (int begin = 0; begin < count; begin += 32) {
      const int64_t key = begin + lane < count ? keys[begin + lane] : kEmpty;
      const bool keep = begin + lane < count && key >= lowest;
      const unsigned keepers = __ballot_sync(~0u, keep);
      __syncwarp();  // the places have been read that are written now
      if (keep) keys[kept + __popc(keepers & ((1u << lane) - 1))] = key;
      kept += __popc(keepers);
    }
    if (lane == 0) {
      thresholds_.count[q] = kept;
      thresholds_.lowest[q] = score_of(lowest);
    }
  }

  // The k-th largest of more than k keys, 5 bits after the other from the highest: lane i counts the keys whose
  // next bits are i.
  __device__ int64_t kth_largest(const int64_t* keys, int count) {
    constexpr uint64_t kSign = uint64_t{1} << 63;
    unsigned* bins = thresholds_.bins[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    uint64_t found = 0;              // the bits so far, of keys as unsigned numbers
    unsigned wanted = survivors_.k;  // which of the keys that begin so is looked for
    for (int shift = 60; shift >= 0; shift -= 5) {
      bins[lane] = 0;
      __syncwarp();
      for (int i = lane; i < count; i += 32) {
        const uint64_t key = static_cast<uint64_t>(keys[i]) ^ kSign;
        if (shift == 60 || key >> (shift + 5) == found >> (shift + 5)) {
          atomicAdd(&bins[key >> shift & 31], 1u);
        }
      }
      __syncwarp();
      const unsigned own = bins[lane];
      unsigned above = own;  // keys whose bits are at least the lane's, in the end
      for (int distance = 1; distance < 32; distance *= 2) {
        const unsigned other = __shfl_down_sync(~0u, above, distance);
        if (lane + distance < 32) above += other;
      }
      above -= own;
      const unsigned here = __ballot_sync(~0u, above < wanted && wanted <= above + own);
      const int bits = __ffs(here) - 1;
      wanted -= __shfl_sync(~0u, above, bits);
      found |= static_cast<uint64_t>(bits) << shift;
      __syncwarp();
    }
    return static_cast<int64_t>(found ^ kSign);
  }

  Thresholds<kColumns>& thresholds_;
  const Survivors& survivors_;
  int first_, queries_, slice_;
};

}  // namespace trackstar::cuda
