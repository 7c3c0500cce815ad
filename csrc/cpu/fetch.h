// Fetching rows that are read one after another. For *_kernel.cpp only.
#pragma once

#include "cpu/fetch_lines.h"

namespace trackstar::TRACKSTAR_ISA {
namespace {

// GCC takes a function that does nothing but fetch for one that does nothing, unless it is part of its caller by then.
#define TRACKSTAR_FETCH __attribute__((always_inline)) inline

constexpr size_t kPagesAhead = 64 << 10;  // bytes

// What lies further on, inside the same array or not: it is fetched, never read.
inline const char* further(const void* from, size_t bytes) {
  return reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(from) + bytes);
}

// Another line for each: of every kWovenBytes, eight pages, the first line of each page, then the second ones, and so on.
// Where a page is slow to find, eight are looked for at the same time.
inline const char* woven(const void* line) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(line), number = at % kWovenBytes / kLineBytes;
  return reinterpret_cast<const char*>(at - at % kWovenBytes + number % 8 * kPageBytes +
                                       number / 8 * kLineBytes);
}

// Before `bytes` at `from` are read: a line of each page that lies kPagesAhead further on. Processors that fetch ahead
// by themselves stop at the end of a page, and to find the next takes longer than to read it.
TRACKSTAR_FETCH void fetch_pages(const void* from, size_t bytes) {
  const char* later = further(from, kPagesAhead);
  for (size_t i = 0; i < bytes; i += kPageBytes) __builtin_prefetch(later + i);
}

constexpr size_t kStreamAhead = 8 << 10;  // bytes

// Before `bytes` at `from` are read, where all that follows is read as well: what lies a little further on, into the
// first-level cache (Zen 5: one query on float32 and float16 rows in 0.9 of the time that whole rows ahead take).
TRACKSTAR_FETCH void fetch_stream(const void* from, size_t bytes, bool weave) {
  const char* later = further(from, weave ? kWovenBytes : kStreamAhead);
#pragma GCC unroll 8
  for (size_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(weave ? woven(later + i) : later + i);
}

// Where codes are read one after another: a line that much further on. One query on int8 rows takes 0.86 of the time with
// 256-bit vectors (Zen 3), 0.85 with longer ones (Zen 5).
TRACKSTAR_FETCH void fetch_ahead([[maybe_unused]] const void* from, [[maybe_unused]] bool weave) {
#if defined(__AVX512F__)
  __builtin_prefetch(weave ? woven(further(from, kWovenBytes)) : further(from, kStreamAhead));
#elif defined(__AVX2__)
  __builtin_prefetch(weave ? woven(further(from, kWovenBytes)) : further(from, 2048));
#endif
}

// Spreads lines evenly over a loop: next() is called at each of so many steps. They come as near as __builtin_prefetch
// says by kLocality: 2 is the second-level cache, 3 the first.
template <int kLocality>
class SpreadTo {
 public:
  SpreadTo(const FetchLines& fetch, size_t steps)
      : at_(fetch.from),
        end_(at_ + fetch.lines * kLineBytes),
        woven_(fetch.woven),
        rate_(steps == 0 ? 0 : (fetch.lines * kOne + steps - 1) / steps) {}

  TRACKSTAR_FETCH void next() {
    for (due_ += rate_; due_ >= kOne && at_ < end_; due_ -= kOne, at_ += kLineBytes)
      __builtin_prefetch(woven_ ? woven(at_) : reinterpret_cast<const char*>(at_), 0, kLocality);
  }

 private:
  static constexpr size_t kOne = 256;  // line

  const uint8_t *at_, *const end_;
  const bool woven_;
  size_t rate_, due_ = 0;
};

using Spread = SpreadTo<2>;
using SpreadNear = SpreadTo<3>;

}  // namespace
}  // namespace trackstar::TRACKSTAR_ISA
