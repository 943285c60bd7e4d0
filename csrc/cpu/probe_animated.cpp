// PNG, GIF and WebP: what they hold, one block after the other.

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/probe_formats.h"

namespace rtp_mm::probing {
namespace {

// Frames that an animation control chunk announces: as in Pillow, one with a number that cannot be counts for nothing.
uint64_t announced_frames(const Bytes& file, uint64_t chunk) {
  const uint64_t frames = file.big(chunk + 8, 4);
  return frames <= uint64_t{1} << 31 ? frames : 0;
}

// Where Pillow's header ends.
bool is_png_data_or_end(const Bytes& file, uint64_t chunk) {
  return file.has(chunk + 4, "IDAT") || file.has(chunk + 4, "IEND");
}

// Frames of the animation that a chunk before the image data announces, else 1.
uint64_t count_png_frames(const Bytes& file) {
  for (uint64_t at = 8;; at = Bytes::end_of(at + 12, file.big(at, 4))) {
    file.step();
    if (is_png_data_or_end(file, at)) return 1;
    if (!file.has(at + 4, "acTL")) continue;
    if (const uint64_t frames = announced_frames(file, at)) return frames;
  }
}

// What a frame control chunk says of how long its frame is shown.
double png_milliseconds(const Bytes& file, uint64_t chunk) {
  if (file.big(chunk, 4) < 26) throw std::invalid_argument("a frame's header is too short");
  const uint64_t numerator = file.big(chunk + 28, 2), denominator = file.big(chunk + 30, 2);
  return static_cast<double>(numerator) / static_cast<double>(denominator ? denominator : 100) * 1000;
}

// A GIF's blocks: of extensions, only how long the next frame is shown is read.
struct GifBlocks {
  const Bytes& file;
  uint64_t at, block = at;  // where the one begins that `find_frame` came to
  double milliseconds = 0;

  void skip_color_table(uint8_t flags) {
    if (flags & 0x80) at += uint64_t{3} << ((flags & 7) + 1);
  }

  void skip_data() {
    for (; const uint8_t length = file[at]; at += 1 + length) file.step();
    ++at;
  }

  void skip_extension() {
    constexpr uint8_t kGraphicControl = 0xf9, kDelayEnd = 3;
    if (file[at++] == kGraphicControl && file[at] >= kDelayEnd) milliseconds = 10.0 * file.little(at + 2, 2);
    skip_data();
  }

  // Whether there is another frame before the trailer; its descriptor begins at `at`.
  bool find_frame() {
    for (milliseconds = 0;; file.step()) {
      block = at;
      switch (file[at++]) {
        case ',':
          return true;
        case ';':
          return false;
        case '!':
          skip_extension();
      }
    }
  }

  // Where the frame ends on the canvas: at its right and at its bottom.
  uint64_t frame_right() const { return file.little(at, 2) + file.little(at + 4, 2); }
  uint64_t frame_bottom() const { return file.little(at + 2, 2) + file.little(at + 6, 2); }

  void skip_frame() {
    const uint8_t flags = file[at + 8];
    at += 9;
    skip_color_table(flags);
    ++at;  // the code size
    skip_data();
  }
};

GifBlocks gif_blocks(const Bytes& file) {
  GifBlocks blocks{file, 13};
  blocks.skip_color_table(file[10]);
  return blocks;
}

// An animation has a first chunk that says so, and frames in chunks behind it.
bool is_animated_webp(const Bytes& file) { return file[15] == 'X' && file[20] & 2; }

// Calls visit(at, length) for the chunk of every frame.
template <class Visit>
void visit_webp_frames(const Bytes& file, Visit visit) {
  const uint64_t first = file.little(16, 4), end = 8 + file.little(4, 4);
  for (uint64_t at = 20 + first + first % 2; at + 8 <= end; file.step()) {
    const uint64_t length = file.little(at + 4, 4);
    if (file.has(at, "ANMF")) visit(at, length);
    at += 8 + length + length % 2;
  }
}

}  // namespace

ImageHeader png(const Bytes& file) {
  for (uint64_t at = 8;; at = Bytes::end_of(at + 12, file.big(at, 4))) {
    file.step();
    if (is_png_data_or_end(file, at)) throw NoImage{};
    if (!file.has(at + 4, "IHDR")) continue;
    return {"PNG", file.big(at + 8, 4), file.big(at + 12, 4),
            frames_or_unknown([&] { return count_png_frames(file); })};
  }
}

// An animation is announced before the image data. The file may end without its end chunk, but within none.
Animation png_animation(const Bytes& file, const ImageHeader& header) {
  Animation animation{header.width, header.height, {}};
  uint64_t announced = 0, end = 0;
  bool is_data_reached = false;
  for (uint64_t at = 8; at < file.size() && !file.has(at + 4, "IEND"); at = end) {
    file.step();
    end = Bytes::end_of(at + 12, file.big(at, 4));
    file.require(end, 0);
    if (file.has(at + 4, "acTL") && !is_data_reached) {
      if (announced) throw std::invalid_argument("it announces two animations");
      announced = announced_frames(file, at);
    } else if (file.has(at + 4, "fcTL")) {
      add_frame(animation, png_milliseconds(file, at));
    } else if (file.has(at + 4, "IDAT")) {
      is_data_reached = true;
      if (!announced) break;
    }
  }
  if (!announced) animation.milliseconds = {0};
  const uint64_t found = animation.milliseconds.size();
  if (announced && found != announced) {
    throw std::invalid_argument("its header announces " + std::to_string(announced) + " frames, it holds " +
                                std::to_string(found));
  }
  return animation;
}

// The screen, made larger by a first frame that leaves it, as in Pillow.
ImageHeader gif(const Bytes& file) {
  GifBlocks blocks = gif_blocks(file);
  if (!blocks.find_frame()) throw NoImage{};
  const uint64_t width = std::max(file.little(6, 2), blocks.frame_right());
  const uint64_t height = std::max(file.little(8, 2), blocks.frame_bottom());
  const uint64_t frames = frames_or_unknown([&] {
    uint64_t count = 1;
    for (blocks.skip_frame(); blocks.find_frame(); blocks.skip_frame()) ++count;
    return count;
  });
  return {"GIF", width, height, frames};
}

// The trailer may be missing.
Animation gif_animation(const Bytes& file, const ImageHeader& header) {
  Animation animation{header.width, header.height, {}};
  GifBlocks blocks = gif_blocks(file);
  const auto find_frame = [&] {
    try {
      return blocks.find_frame();
    } catch (EndsEarly) {
      if (blocks.block < file.size()) throw;
      return false;
    }
  };
  for (; find_frame(); blocks.skip_frame()) {
    animation.width = std::max(animation.width, blocks.frame_right());
    animation.height = std::max(animation.height, blocks.frame_bottom());
    add_frame(animation, blocks.milliseconds);
  }
  return animation;
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
      const auto count = [&] {
        uint64_t frames = 0;
        visit_webp_frames(file, [&](uint64_t, uint64_t) { ++frames; });
        return frames;
      };
      return {"WEBP", width, height, is_animated_webp(file) ? frames_or_unknown(count) : 1};
    }
    default:
      throw NoImage{};
  }
}

Animation webp_animation(const Bytes& file, const ImageHeader& header) {
  Animation animation{header.width, header.height, {}};
  file.require(8 + file.little(4, 4), 0);  // its end
  if (!is_animated_webp(file)) {
    animation.milliseconds = {0};
    return animation;
  }
  visit_webp_frames(file, [&](uint64_t at, uint64_t length) {
    constexpr uint64_t kFrameHeader = 16;
    if (length < kFrameHeader) throw std::invalid_argument("a frame's header is too short");
    file.require(at + 8, length);
    add_frame(animation, static_cast<double>(file.little(at + 20, 3)));
  });
  return animation;
}

}  // namespace rtp_mm::probing
