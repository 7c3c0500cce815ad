// Fetching rows that are read one after another. For *_kernel.cpp only.
#pragma once

#include <stddef.h>

namespace trackstar::TRACKSTAR_ISA {
namespace {

constexpr size_t kPageBytes = 4096;       // the smallest there are
constexpr size_t kPagesAhead = 64 << 10;  // bytes

// Before `bytes` at `from` are read: a line of each page that lies kPagesAhead further on. Processors that fetch ahead
// by themselves stop at the end of a page, and to find the next takes longer than to read it.
inline void fetch_pages(const void* from, size_t bytes) {
  const char* later = static_cast<const char*>(from) + kPagesAhead;
  for (size_t i = 0; i < bytes; i += kPageBytes) __builtin_prefetch(later + i);
}

}  // namespace
}  // namespace trackstar::TRACKSTAR_ISA
