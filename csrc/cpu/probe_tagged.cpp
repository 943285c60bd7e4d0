// JPEG and TIFF. They share a directory of tags: a JPEG of several pictures (MPO) tells their number in one.

#include <algorithm>
#include <array>
#include <optional>

#include "cpu/probe_formats.h"

namespace rtp_mm::probing {
namespace {

// Bytes of one value by TIFF type, 0 for what is no integer.
constexpr std::array<int, 17> kIntegerBytes = {0, 0, 0, 2, 4, 0, 1, 0, 2, 4, 0, 0, 0, 4, 0, 0, 8};

// A TIFF structure within a file; its offsets count from `begin`.
struct Tags {
  const Bytes& file;
  uint64_t begin;
  Endian endian;
  bool is_big;  // BigTIFF: offsets and counts of 64 bits

  static Tags at(const Bytes& file, uint64_t begin) {
    const Endian endian = file[begin] == 'M' ? Endian::kBig : Endian::kLittle;
    return {file, begin, endian, file.number(begin + 2, 2, endian) == 43};
  }

  uint64_t offset_bytes() const { return is_big ? 8 : 4; }
  uint64_t number(uint64_t offset, int bytes) const { return file.number(begin + offset, bytes, endian); }
  uint64_t first_directory() const { return is_big ? number(8, 8) : number(4, 4); }

  // The first value of the entry at `entry`, an integer.
  std::optional<uint64_t> value(uint64_t entry) const {
    const uint64_t type = number(entry + 2, 2), count = number(entry + 4, offset_bytes());
    const int bytes = type < kIntegerBytes.size() ? kIntegerBytes[type] : 0;
    if (bytes == 0 || count == 0) return std::nullopt;
    const uint64_t field = entry + 4 + offset_bytes();
    const bool is_inline = count <= offset_bytes() / bytes;
    return number(is_inline ? field : number(field, offset_bytes()), bytes);
  }
};

// Calls visit(tag, entry) for each entry of a directory; returns the offset of the next directory.
template <class Visit>
uint64_t walk(const Tags& tags, uint64_t directory, Visit visit) {
  const uint64_t count = tags.number(directory, tags.is_big ? 8 : 2), entry_bytes = tags.is_big ? 20 : 12;
  uint64_t entry = directory + (tags.is_big ? 8 : 2);
  for (uint64_t i = 0; i < count; ++i, entry += entry_bytes) {
    tags.file.step();
    visit(tags.number(entry, 2), entry);
  }
  return tags.number(entry, tags.offset_bytes());
}

// Pictures that a JPEG's MPF segment lists (CIPA DC-007), 1 for what cannot be read.
uint64_t count_pictures(const Bytes& file, uint64_t begin) {
  constexpr uint64_t kNumberOfImages = 0xb001;
  const Tags tags = Tags::at(file, begin);
  uint64_t count = 1;
  walk(tags, tags.first_directory(), [&](uint64_t tag, uint64_t entry) {
    if (tag == kNumberOfImages) count = tags.value(entry).value_or(1);
  });
  return count;
}

bool is_start_of_frame(uint64_t marker) {
  return marker >= 0xc0 && marker <= 0xcf && marker != 0xc4 && marker != 0xc8 && marker != 0xcc;
}

// Markers that stand alone: restart, start and end of image, reserved ones.
bool has_no_segment(uint64_t marker) {
  return marker == 0xc8 || (marker >= 0xd0 && marker <= 0xd9) || (marker >= 0xf0 && marker <= 0xfd);
}

}  // namespace

ImageHeader jpeg(const Bytes& file) {
  uint64_t pictures = 1;
  for (uint64_t at = 2;; file.step()) {
    if (file[at] != 0xff || file[at + 1] == 0xff || file[at + 1] == 0) {  // junk, or fill bytes
      ++at;
      continue;
    }
    const uint8_t marker = file[at + 1];
    at += 2;
    if (is_start_of_frame(marker)) return {"JPEG", file.big(at + 5, 2), file.big(at + 3, 2), pictures};
    if (marker < 0xc0 || marker == 0xda) throw NoImage{};  // no marker, or a scan of no frame
    if (has_no_segment(marker)) continue;
    if (marker == 0xe2 && file.has(at + 2, {"MPF\0", 4})) {
      pictures = frames_or_unknown([&] { return count_pictures(file, at + 6); });
    }
    at += std::max<uint64_t>(file.big(at, 2), 2);
  }
}

ImageHeader tiff(const Bytes& file) {
  constexpr uint64_t kWidth = 256, kHeight = 257, kOrientation = 274;
  const Tags tags = Tags::at(file, 0);
  std::optional<uint64_t> width, height, orientation;
  const uint64_t next = walk(tags, tags.first_directory(), [&](uint64_t tag, uint64_t entry) {
    auto* const value = tag == kWidth         ? &width
                        : tag == kHeight      ? &height
                        : tag == kOrientation ? &orientation
                                              : nullptr;
    if (value && !*value) *value = tags.value(entry);
  });
  ImageHeader header{"TIFF", width.value_or(0), height.value_or(0), next == 0 ? uint64_t{1} : 0};
  if (orientation >= 5 && orientation <= 8) std::swap(header.width, header.height);
  return header;
}

}  // namespace rtp_mm::probing

namespace rtp_mm {

size_t count_jpeg_scans(const uint8_t* data, size_t size) {
  constexpr size_t kBlock = 255;  // as many as a byte counts, by which the compiler vectorises
  size_t scans = 0;
  for (size_t at = 1; at < size;) {
    uint8_t in_block = 0;
    for (const size_t end = std::min(size, at + kBlock); at < end; ++at) {
      in_block += (data[at - 1] == 0xff) & (data[at] == 0xda);
    }
    scans += in_block;
  }
  return scans;
}

}  // namespace rtp_mm
