// Narrowing rows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trackstar {

// The codes of int4 that lose least: blocks (N, d) of numbers from -1 to 1 become codes (N, ⌈d/64⌉ + ⌈d/2⌉), laid out as
// trackstar_kernels/encode/README.md says, the same on every instruction set level and for any number of threads. No
// number is NaN.
void pack_best_codes(const float* unit, size_t N, size_t d, uint8_t* codes, int threads);

}  // namespace trackstar
