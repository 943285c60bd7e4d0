#pragma once

#include <cstdint>

namespace rtp_mm {

// Patch rows [height/patch * width/patch, 3 * temporal * patch * patch] in merge-block order.
struct PatchRows {
  uint8_t* rows;
  int64_t width;  // pixels
  int64_t patch, merge;
  int64_t temporal, slot;
};

// Cuts one row of patches out of `patch` lines, line y at `lines[y]`: three planes, `plane` bytes apart, each of which
// may be read 16 bytes past its end. `patch_row` counts from the image's top.
void cut_patches(const uint8_t* const* lines, int64_t plane, int64_t patch_row, const PatchRows& dst);

}  // namespace rtp_mm
