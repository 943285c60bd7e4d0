#pragma once

#include <cstdint>

#include "cpu/resize_windows.h"

namespace rtp_mm {

// Instruction sets that the kernels are written for, each one faster than those before; all give the same bytes.
#ifdef __aarch64__
enum class ResizeLevel { kPortable, kNeonI8mm };
#else
enum class ResizeLevel { kPortable, kAvx2, kAvx512Vnni, kAvx512Vbmi };
#endif

ResizeLevel best_resize_level();  // of this CPU

// RGB, or four bytes a pixel of which the last is ignored.
struct PixelView {
  const uint8_t* pixels;
  int64_t height, width;
  int64_t row_stride;    // bytes, at least width * pixel_stride
  int64_t pixel_stride;  // 3 or 4 bytes
};

struct ResizePatchify {
  int64_t height, width;  // of the resized image, divisible by patch * merge
  int64_t patch, merge;
  int64_t temporal, slot;  // frames in one patch, and which of them this image is: 1 and 0 for a still one
  ResizeFilter filter;
  bool is_vertical_first;
  ResizeLevel level;
};

// Pillow's 8-bit resize, each of its two passes rounded to a byte, and cut into patches on the way.
//
// rows [height/patch * width/patch, 3 * temporal * patch * patch] in merge-block order (block row, block column, row in
// block, column in block), columns (channel, frame, y, x); only the columns of frame `slot` are written. Scratch memory
// is the calling thread's and stays.
void resize_patchify(const PixelView& image, const ResizePatchify& job, uint8_t* rows);

}  // namespace rtp_mm
