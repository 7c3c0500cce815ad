// Micro-kernels of pack_best_codes, one per instruction set level.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace trackstar {

constexpr size_t kMostLanes = 16;  // at any level

// As many groups as there are lanes, side by side: element i of group g at [i * lanes + g]. The first used[g] count; there is
// at least one.
struct TrellisKernel {
  size_t lanes;
  void (*run)(const float* values, const int32_t* used, int32_t* codes, int32_t* multipliers);
};

namespace baseline {
extern const TrellisKernel trellis_kernel;
}
namespace v3 {
extern const TrellisKernel trellis_kernel;
}
namespace v4 {
extern const TrellisKernel trellis_kernel;
}

}  // namespace trackstar
