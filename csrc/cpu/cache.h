// The size of the second-level cache.
#pragma once

#include <cstddef>

namespace trackstar {

// Bytes for each core; 1 MiB where the system does not say.
size_t second_level_cache();

}  // namespace trackstar
