#include "cpu/cache.h"

#include <unistd.h>

namespace trackstar {

size_t second_level_cache() {
  static const size_t size = [] {
    long found = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found > 0 ? static_cast<size_t>(found) : size_t{1} << 20;
  }();
  return size;
}

}  // namespace trackstar
