#pragma once

#include <cstdint>

namespace rtp_mm {

// RGBA pixels over opaque white, as Pillow's `alpha_composite` rounds them, to RGB.
void over_white(const uint8_t* rgba, int64_t pixels, uint8_t* rgb);

}  // namespace rtp_mm
