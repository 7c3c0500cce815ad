// Lines to fetch while a micro-kernel works.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace trackstar {

constexpr size_t kLineBytes = 64;
constexpr size_t kPageBytes = 4096;  // the smallest there are
constexpr size_t kWovenBytes = 8 * kPageBytes;

// One after another, or woven (fetch.h) with those around them; most kernels fetch into the second-level cache, as until the
// lines are read more goes through the first than it holds.
struct FetchLines {
  const uint8_t* from;
  size_t lines;
  bool woven;
};

}  // namespace trackstar
