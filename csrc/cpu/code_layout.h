// How narrow codes lie in a block: trackstar_kernels/encode/README.md.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace trackstar {

constexpr size_t int4_bytes(size_t d) { return (d + 63) / 64 + (d + 1) / 2; }

constexpr size_t kInt4Cell = int4_bytes(64);

// The numbers of int4's codes, plus 128, by multiplier less 1 and code.
struct Int4Levels {
  alignas(16) uint8_t of[16][16];
};

constexpr Int4Levels int4_levels() {
  constexpr int kLargest[16] = {0, 13, 26, 40, 55, 73, 94, 123, -127, -100, -79, -63, -48, -35, -23, -11};
  Int4Levels levels{};
  for (int multiplier = 1; multiplier <= 16; ++multiplier) {
    for (int code = 0; code < 16; ++code) {
      levels.of[multiplier - 1][code] =
          static_cast<uint8_t>((kLargest[code] * multiplier + 8 + 16 * 128) / 16);
    }
  }
  return levels;
}

constexpr Int4Levels kInt4Levels = int4_levels();

}  // namespace trackstar
