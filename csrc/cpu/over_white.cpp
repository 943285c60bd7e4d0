#include "cpu/over_white.h"

#include <cstring>

namespace rtp_mm {
namespace {

// Pillow blends with weights in units of 1/128 and divides by 255 with two shifts.
constexpr uint32_t kOne = 255 << 7, kHalf = 0x80 << 7;

uint8_t blend(uint32_t colour, uint32_t alpha) {
  const uint32_t weight = alpha << 7;
  const uint32_t sum = colour * weight + 255 * (kOne - weight) + kHalf;
  return (((sum >> 8) + sum) >> 8) >> 7;
}

}  // namespace

void over_white(const uint8_t* rgba, int64_t pixels, uint8_t* rgb) {
  for (int64_t i = 0; i < pixels; ++i, rgba += 4, rgb += 3) {
    if (rgba[3] == 255) {  // most pixels of most images
      std::memcpy(rgb, rgba, 3);
    } else {
      for (int channel = 0; channel < 3; ++channel) rgb[channel] = blend(rgba[channel], rgba[3]);
    }
  }
}

}  // namespace rtp_mm
