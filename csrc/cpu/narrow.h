// Stored 16-bit floats, as their bits.
#pragma once

#include <stdint.h>

namespace trackstar {

struct Half {  // IEEE binary16
  uint16_t bits;
};

struct Bfloat16 {  // the upper half of a float
  uint16_t bits;
};

}  // namespace trackstar
