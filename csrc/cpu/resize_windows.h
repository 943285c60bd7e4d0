// Pillow's filters as integer coefficients, for every device.

#pragma once

#include <cstdint>
#include <vector>

namespace rtp_mm {

// 22 fraction bits, as in Pillow: 32, less 8 for the byte, less 2 because weights overshoot [0, 1].
constexpr int kFractionBits = 22;

// Pillow's filters.
enum class ResizeFilter { kNearest, kBox, kBilinear, kHamming, kBicubic, kLanczos };

// The coefficients of one output: those of input pixels first, first + 1, ...; at least one.
struct ResizeWindow {
  int64_t first;
  std::vector<int32_t> coefficients;
};

// One per output. An axis that is not resized has one tap of 1, which changes no byte.
std::vector<ResizeWindow> resize_windows(int64_t size, int64_t out_size, ResizeFilter filter);

}  // namespace rtp_mm
