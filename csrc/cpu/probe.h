#pragma once

#include <cstddef>
#include <cstdint>
#include <variant>

namespace rtp_mm {

// What an image file says of itself.
struct ImageHeader {
  const char* format;      // Pillow's name of it
  uint64_t width, height;  // pixels, as Pillow opens it: before any EXIF turn; not 0
  uint64_t frames;         // of an animation, 1 for a still image, 0 where these bytes do not tell
};

struct NeedsMore {
  uint64_t bytes;  // from the file's beginning, more than there were
};

// Neither: these bytes begin no image of a known format.
using ProbeResult = std::variant<std::monostate, NeedsMore, ImageHeader>;

// Reads the header of a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIF, JPEG 2000, ICO, PPM, QOI or TGA file from its
// first `size` bytes, or all of them. More bytes change nothing about a header but its frames, from 0 to a number.
//
// Allocates nothing, and looks at no more than a fixed number of segments, blocks or entries, whatever the header says.
ProbeResult probe(const uint8_t* data, size_t size);

}  // namespace rtp_mm
