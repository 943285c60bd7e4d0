#pragma once

#include <cstdint>

namespace rtp_mm {

// Packed RGB frames and how they are cut: height and width divisible by patch * merge, frames by temporal.
struct Patchify {
  const uint8_t* pixels;  // [frames, height, width, 3]
  int64_t frames, height, width;
  int64_t patch, merge, temporal;  // temporal: frames in one patch
};

// rows [frames/temporal * height/patch * width/patch, 3 * temporal * patch * patch]: in merge-block order
// (frame group, block row, block column, row in block, column in block), columns (channel, frame, y, x).
void patchify(const Patchify& job, uint8_t* rows);

}  // namespace rtp_mm
