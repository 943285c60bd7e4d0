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

}  // namespace rtp_mm
