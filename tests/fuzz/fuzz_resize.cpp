// resize_patchify with sizes, strides, filter, order and level from the input: it stays within its memory (source and
// rows are heap blocks of their exact size), and every level gives the portable one's bytes.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/resize.h"
#include "input.h"

namespace rtp_mm {
namespace {

struct Case {
  PixelView image;  // pixels: null until they are there
  ResizePatchify job;
  int64_t source_bytes, row_bytes;
};

// Sides of up to 256, most of them small: every band, window and block of the kernels is within, and runs are many.
Case read_case(fuzz::Input& input) {
  const auto side = [&] { return input.between(1, int64_t{1} << input.between(0, 8)); };
  Case c{};
  const int64_t pixel_stride = input.between(3, 4);
  const int64_t height = side(), width = side();
  const int64_t row = (width - 1) * pixel_stride + 3, stride = row + input.between(0, 70);
  c.image = {nullptr, height, width, stride, pixel_stride};
  c.source_bytes = (height - 1) * stride + row;
  const int64_t patch = input.between(1, 32), merge = input.between(1, 4), block = patch * merge;
  const auto resized = [&](int64_t source) {  // an equal side skips its pass
    return input.flag() && source % block == 0 ? source : block * ((side() - 1) / block + 1);
  };
  c.job.height = resized(height);
  c.job.width = resized(width);
  c.job.patch = patch;
  c.job.merge = merge;
  c.job.temporal = input.between(1, 3);
  c.job.slot = input.between(0, c.job.temporal - 1);
  c.job.filter = ResizeFilter(input.between(0, 5));
  c.job.is_vertical_first = input.flag();
  c.job.level = ResizeLevel(input.between(0, static_cast<int64_t>(best_resize_level())));
  c.row_bytes = c.job.height * c.job.width * 3 * c.job.temporal;
  return c;
}

std::unique_ptr<uint8_t[]> resized(const Case& c, ResizeLevel level) {
  ResizePatchify job = c.job;
  job.level = level;
  auto rows = std::make_unique<uint8_t[]>(c.row_bytes);
  resize_patchify(c.image, job, rows.get());
  return rows;
}

}  // namespace
}  // namespace rtp_mm

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  rtp_mm::fuzz::Input input(data, size);
  rtp_mm::Case c = rtp_mm::read_case(input);
  const auto pixels = std::make_unique<uint8_t[]>(c.source_bytes);
  for (int64_t at = 0; at < c.source_bytes && input.rest_bytes(); at += input.rest_bytes()) {
    const int64_t count = std::min<int64_t>(input.rest_bytes(), c.source_bytes - at);
    std::memcpy(pixels.get() + at, input.rest(), count);
  }
  c.image.pixels = pixels.get();
  const auto rows = resized(c, c.job.level), expected = resized(c, rtp_mm::ResizeLevel::kPortable);
  if (std::memcmp(rows.get(), expected.get(), c.row_bytes) != 0) std::abort();
  return 0;
}
