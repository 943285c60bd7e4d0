// PNG, GIF and WebP: what they hold, one block after the other.

#include <algorithm>

#include "cpu/probe_formats.h"

namespace rtp_mm::probing {
namespace {

// Frames of the animation that a chunk between `at` and the image data announces, else 1.
uint64_t count_png_frames(const Bytes& file, uint64_t at) {
  for (;; at = Bytes::end_of(at + 12, file.big(at, 4))) {
    file.step();
    if (file.has(at + 4, "IDAT")) return 1;
    if (file.has(at + 4, "acTL")) {
      const uint64_t frames = file.big(at + 8, 4);
      return frames >= 1 && frames <= uint64_t{1} << 31 ? frames : 1;
    }
  }
}

// A GIF's blocks: extensions are skipped.
struct GifBlocks {
  const Bytes& file;
  uint64_t at;

  void skip_color_table(uint8_t flags) {
    if (flags & 0x80) at += uint64_t{3} << ((flags & 7) + 1);
  }

  void skip_data() {
    for (; const uint8_t length = file[at]; at += 1 + length) file.step();
    ++at;
  }

  // Whether there is another frame before the trailer; its descriptor begins at `at`.
  bool find_frame() {
    for (;; file.step()) {
      switch (file[at++]) {
        case ',':
          return true;
        case ';':
          return false;
        case '!':
          ++at;
          skip_data();
      }
    }
  }

  void skip_frame() {
    const uint8_t flags = file[at + 8];
    at += 9;
    skip_color_table(flags);
    ++at;  // the code size
    skip_data();
  }
};

uint64_t count_webp_frames(const Bytes& file, uint64_t at, uint64_t end) {
  uint64_t frames = 0;
  for (; at + 8 <= end; file.step()) {
    frames += file.has(at, "ANMF");
    const uint64_t length = file.little(at + 4, 4);
    at += 8 + length + length % 2;
  }
  return frames;
}

}  // namespace

ImageHeader png(const Bytes& file) {
  for (uint64_t at = 8;; at = Bytes::end_of(at + 12, file.big(at, 4))) {
    file.step();
    if (file.has(at + 4, "IDAT")) throw NoImage{};
    if (!file.has(at + 4, "IHDR")) continue;
    const uint64_t next = Bytes::end_of(at + 12, file.big(at, 4));
    return {"PNG", file.big(at + 8, 4), file.big(at + 12, 4),
            frames_or_unknown([&] { return count_png_frames(file, next); })};
  }
}

// The screen, made larger by a first frame that leaves it, as in Pillow.
ImageHeader gif(const Bytes& file) {
  GifBlocks blocks{file, 13};
  blocks.skip_color_table(file[10]);
  if (!blocks.find_frame()) throw NoImage{};
  const auto field = [&](int index) { return file.little(blocks.at + 2 * index, 2); };
  const uint64_t width = std::max(file.little(6, 2), field(0) + field(2));
  const uint64_t height = std::max(file.little(8, 2), field(1) + field(3));
  const uint64_t frames = frames_or_unknown([&] {
    uint64_t count = 1;
    for (blocks.skip_frame(); blocks.find_frame(); blocks.skip_frame()) ++count;
    return count;
  });
  return {"GIF", width, height, frames};
}

ImageHeader webp(const Bytes& file) {
  if (!file.has(0, "RIFF")) throw NoImage{};
  switch (file[15]) {
    case ' ': {
      if (!file.has(23, "\x9d\x01\x2a")) throw NoImage{};
      return {"WEBP", file.little(26, 2) & 0x3fff, file.little(28, 2) & 0x3fff, 1};
    }
    case 'L': {
      if (file[20] != 0x2f) throw NoImage{};
      const uint64_t bits = file.little(21, 4);
      return {"WEBP", (bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1, 1};
    }
    case 'X': {
      const uint64_t width = file.little(24, 3) + 1, height = file.little(27, 3) + 1;
      const bool is_animated = file[20] & 2;
      const uint64_t first = 20 + file.little(16, 4), end = 8 + file.little(4, 4);
      const auto count = [&] { return count_webp_frames(file, first + first % 2, end); };
      return {"WEBP", width, height, is_animated ? frames_or_unknown(count) : 1};
    }
    default:
      throw NoImage{};
  }
}

}  // namespace rtp_mm::probing
