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

// Rows in memory, each of which may be read somewhat further.
struct Rows {
  const uint8_t* pixels;
  int64_t stride;  // bytes from one to the next
};

// Where a resize takes an image from, from top to bottom.
class RowSource {
 public:
  RowSource(int64_t height, int64_t width, int64_t pixel_stride)
      : height(height), width(width), pixel_stride(pixel_stride) {}
  virtual ~RowSource() = default;

  // Rows [begin, begin + count), at most kBandRows of them, each readable for `reach` bytes, at most kReadAhead more
  // than its own. Below the image its last row is repeated. `begin` is where the last call ended, a multiple of
  // `count`.
  virtual Rows rows(int64_t begin, int64_t count, int64_t reach) = 0;

  const int64_t height, width;
  const int64_t pixel_stride;  // 3 or 4 bytes
};

constexpr int64_t kBandRows = 16;   // rows that the horizontal pass takes side by side
constexpr int64_t kReadAhead = 64;  // bytes past a row that it reads

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
void resize_patchify(RowSource& image, const ResizePatchify& job, uint8_t* rows);
void resize_patchify(const PixelView& image, const ResizePatchify& job, uint8_t* rows);

}  // namespace rtp_mm
