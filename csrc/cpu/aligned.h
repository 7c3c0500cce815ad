// Arrays that start on a cache line.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace trackstar {

template <typename T>
struct CacheAligned {
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kAlignment)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kAlignment); }
  bool operator==(const CacheAligned&) const { return true; }
  bool operator!=(const CacheAligned&) const { return false; }
  static constexpr std::align_val_t kAlignment{64};
};

template <typename T>
using Aligned = std::vector<T, CacheAligned<T>>;

}  // namespace trackstar
