// bfloat16 and IEEE half as bit patterns, for code that knows no torch.

#pragma once

#include <cstdint>

namespace rtp_mm {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Two bfloat16s that are consecutive in k, the first in the low half: the word that AVX-512 BF16 and AMX multiply.
using BFloat16Pair = uint32_t;

}  // namespace rtp_mm
