// How narrow codes lie in a block: trackstar_kernels/encode/README.md.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace trackstar {

constexpr size_t int4_bytes(size_t d) { return (d + 63) / 64 + (d + 1) / 2; }

constexpr size_t kInt4Group = 32;  // elements that share a multiplier
constexpr size_t kInt4Cell = int4_bytes(64);

// The 32 levels of int4, ascending.
constexpr int int4_level(int i) {
  constexpr int kPositive[16] = {2, 8, 13, 19, 24, 30, 36, 42, 48, 55, 62, 71, 80, 92, 108, 127};
  return i < 16 ? -kPositive[15 - i] : kPositive[i - 16];
}

// The numbers of int4's codes, plus 128, by multiplier less 1, set of levels, and place in it.
struct Int4Levels {
  alignas(16) uint8_t of[16][2][16];
};

constexpr Int4Levels int4_levels() {
  Int4Levels levels{};
  for (int multiplier = 1; multiplier <= 16; ++multiplier) {
    for (int i = 0; i < 32; ++i) {
      levels.of[multiplier - 1][i % 2][i / 2] =
          static_cast<uint8_t>((int4_level(i) * multiplier + 8 + 16 * 128) / 16);
    }
  }
  return levels;
}

constexpr Int4Levels kInt4Levels = int4_levels();

}  // namespace trackstar
