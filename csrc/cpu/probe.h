#pragma once

#include <cstddef>
#include <cstdint>
#include <variant>
#include <vector>

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

// Scans of a whole JPEG file, those of its thumbnails too: how often a marker of one stands in it.
size_t count_jpeg_scans(const uint8_t* data, size_t size);

// The frames of a GIF, WebP, PNG or AVIF file, by its own headers.
struct Animation {
  uint64_t width, height;  // pixels of the canvas that holds every frame, those of a GIF that leave its screen too
  std::vector<double> milliseconds;  // that each frame is shown, as Pillow tells them; 0 where the file does not
};

// Reads every header of a whole file, in a time that grows with its size. Throws `std::invalid_argument` that says what
// is wrong with it.
Animation read_animation(const uint8_t* data, size_t size);

}  // namespace rtp_mm
