// Between probe.cpp and the files that know a format each.

#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#include "cpu/probe.h"

namespace rtp_mm::probing {

// How reading ends where there is no header; caught in probe().
struct EndsEarly {
  uint64_t needed;  // bytes that the file would have to have
};
struct NoImage {};

enum class Endian { kBig, kLittle };

constexpr uint64_t kNoEnd = uint64_t{1} << 62;  // past every file, and far from overflow

// The bytes of a file from its beginning. Offsets may be anything: what is not there throws.
class Bytes {
 public:
  // Up to `most_steps` are taken.
  Bytes(const uint8_t* data, uint64_t size, uint64_t most_steps = kMostSteps)
      : data_(data), size_(size), most_steps_(most_steps) {}

  uint64_t number(uint64_t offset, int bytes, Endian endian) const {
    require(offset, bytes);
    uint64_t value = 0;
    for (int i = 0; i < bytes; ++i) value = value << 8 | data_[offset + (endian == Endian::kBig ? i : bytes - 1 - i)];
    return value;
  }
  uint64_t big(uint64_t offset, int bytes) const { return number(offset, bytes, Endian::kBig); }
  uint64_t little(uint64_t offset, int bytes) const { return number(offset, bytes, Endian::kLittle); }
  uint8_t operator[](uint64_t offset) const { return static_cast<uint8_t>(big(offset, 1)); }

  bool has(uint64_t offset, std::string_view text) const {
    require(offset, text.size());
    return std::memcmp(data_ + offset, text.data(), text.size()) == 0;
  }

  // `has` for a file's signature: one that ends early begins with no signature.
  bool begins_with(std::string_view text, uint64_t offset = 0) const {
    return size_ >= offset + text.size() && has(offset, text);
  }

  // Where a block of `length` bytes at `offset` ends.
  static uint64_t end_of(uint64_t offset, uint64_t length) { return length < kNoEnd ? offset + length : kNoEnd; }

  // Stands in every loop over what a file holds.
  void step() const {
    if (++steps_ > most_steps_) throw NoImage{};
  }

  uint64_t size() const { return size_; }

  void require(uint64_t offset, uint64_t count) const {
    if (offset >= kNoEnd) throw NoImage{};
    if (offset + count > size_) throw EndsEarly{offset + count};
  }

 private:
  // 16 MiB of full GIF blocks, every entry that a TIFF directory can have; 0.1 us each where all of them miss the
  // caches.
  static constexpr uint64_t kMostSteps = 1 << 16;

  const uint8_t* data_;
  uint64_t size_, most_steps_;
  mutable uint64_t steps_ = 0;
};

// The result of `count`, or 0 where the bytes end, or too many of them pass, before it is known.
template <class Count>
uint64_t frames_or_unknown(Count count) {
  try {
    return count();
  } catch (EndsEarly) {
    return 0;
  } catch (NoImage) {
    return 0;
  }
}

// Reads the header of a file that begins as its format does.
using HeaderReader = ImageHeader(const Bytes& file);

HeaderReader jpeg, tiff;
HeaderReader png, gif, webp;
HeaderReader bmp, ico, qoi, pnm, tga;
HeaderReader jpeg2000_boxes, jpeg2000_codestream, heif;

// Of an animation: 3 hours of the shortest that browsers show, 20 ms. Their times take 4 MiB.
inline void check_frames(uint64_t frames) {
  constexpr uint64_t kMostFrames = 1 << 19;
  if (frames > kMostFrames) throw std::invalid_argument("it holds over " + std::to_string(kMostFrames) + " frames");
}

inline void add_frame(Animation& animation, double milliseconds) {
  animation.milliseconds.push_back(milliseconds);
  check_frames(animation.milliseconds.size());
}

// Reads all frames' headers of a file whose own header is this.
using AnimationReader = Animation(const Bytes& file, const ImageHeader& header);

AnimationReader png_animation, gif_animation, webp_animation, avif_animation;

}  // namespace rtp_mm::probing
