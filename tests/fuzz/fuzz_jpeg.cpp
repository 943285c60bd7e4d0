// The decoder of JPEGs on any bytes: it stays within its memory, every instruction set has the same answer, a resize of
// rows as they are decoded has that of the pixels, and windows are parts of them.

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/jpeg_source.h"

namespace rtp_mm {
namespace {

constexpr int64_t kMostPixels = 1 << 16;  // more of them take time and show nothing new

std::optional<std::vector<uint8_t>> pixels_of(const JpegFile& file, Isa isa) {
  std::vector<uint8_t> pixels(file.width * file.height * 3);
  try {
    decode_jpeg(file, pixels.data(), isa);
  } catch (const UncertainJpeg&) {
    return {};
  }
  return pixels;
}

// An image, or rows of a JPEG as they are decoded.
template <class Image>
std::vector<uint8_t> rows_of(Image& image, bool is_vertical_first) {
  constexpr int64_t kHeight = 24, kWidth = 32;
  const ResizePatchify job{kHeight, kWidth, 4, 2, 1, 0, ResizeFilter::kBicubic, is_vertical_first, best_resize_level()};
  std::vector<uint8_t> rows(kHeight * kWidth * 3);
  resize_patchify(image, job, rows.data());
  return rows;
}

std::optional<std::vector<uint8_t>> rows_of(const JpegFile& file, const JpegWindow& window, bool is_vertical_first) {
  try {
    JpegSource source(file, window);
    const std::vector<uint8_t> rows = rows_of<RowSource>(source, is_vertical_first);
    source.finish();
    return rows;
  } catch (const UncertainJpeg&) {
    return {};
  }
}

void check(const JpegFile& file) {
  const auto pixels = pixels_of(file, Isa::kPortable);
  for (int isa = 1; isa <= static_cast<int>(best_isa()); ++isa) {
    if (pixels_of(file, Isa{isa}) != pixels) std::abort();
  }
  const JpegWindow whole{0, 0, file.height, file.width};
  const JpegWindow part{file.height / 3, file.width / 5, (file.height + 2) / 3, (file.width + 4) / 5};
  for (const JpegWindow& window : {whole, part}) {
    for (const bool is_vertical_first : {false, true}) {
      const auto rows = rows_of(file, window, is_vertical_first);
      if (rows.has_value() != pixels.has_value()) std::abort();
      if (!rows) continue;
      const PixelView view{pixels->data() + 3 * (window.top * file.width + window.left), window.height, window.width,
                           3 * file.width, 3};
      if (*rows != rows_of<const PixelView>(view, is_vertical_first)) std::abort();
    }
  }
}

}  // namespace
}  // namespace rtp_mm

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto copy = std::make_unique<uint8_t[]>(size);  // of its exact size, which sanitizers see
  std::copy_n(data, size, copy.get());
  try {
    const rtp_mm::JpegFile file = rtp_mm::read_jpeg(copy.get(), size);
    if (file.width * file.height <= rtp_mm::kMostPixels) rtp_mm::check(file);
  } catch (const rtp_mm::UncertainJpeg&) {
  }
  return 0;
}
