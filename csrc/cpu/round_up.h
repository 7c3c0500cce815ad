// Sizes padded to whole steps. Static, so that no instruction set's copy can stand in for another's.
#pragma once

#include <stddef.h>

namespace trackstar {

static constexpr size_t round_up(size_t size, size_t step) { return (size + step - 1) / step * step; }

}  // namespace trackstar
