// Formats whose header is one record: BMP, ICO (a directory of BMP or PNG), QOI, PPM and its kin, TGA.

#include <bit>
#include <tuple>

#include "cpu/probe_formats.h"

namespace rtp_mm::probing {
namespace {

// The header of a bitmap without its file header, of any of the sizes that it had through the years.
ImageHeader dib(const Bytes& file, uint64_t at) {
  switch (file.little(at, 4)) {
    case 12:
      return {"BMP", file.little(at + 4, 2), file.little(at + 6, 2), 1};
    case 40:
    case 52:
    case 56:
    case 64:
    case 108:
    case 124: {
      const uint64_t height = file.little(at + 8, 4);
      const bool is_top_down = height >> 24 == 0xff;  // a negative height; Pillow takes less negative ones for huge
      return {"BMP", file.little(at + 4, 4), is_top_down ? (uint64_t{1} << 32) - height : height, 1};
    }
    default:
      throw NoImage{};
  }
}

// Pillow's order of an icon's images: the largest first, among equals that of fewer bits a pixel.
struct IconEntry {
  uint64_t pixels, depth, offset;

  static IconEntry at(const Bytes& file, uint64_t entry) {
    const auto side = [](uint64_t value) { return value ? value : 256; };
    const uint8_t colors = file[entry + 2];
    const uint64_t bits = file.little(entry + 6, 2), color_bits = colors ? std::bit_width(colors - 1u) : 0;
    return {side(file[entry]) * side(file[entry + 1]),
            bits         ? bits
            : color_bits ? color_bits
                         : 256,
            file.little(entry + 12, 4)};
  }

  bool goes_before(const IconEntry& other) const {
    return std::tuple(other.pixels, depth) < std::tuple(pixels, other.depth);
  }
};

bool is_space(uint8_t byte) { return byte == ' ' || (byte >= '\t' && byte <= '\r'); }

// The decimal number at `at`, which moves past the white space behind it. Comments run from # to the end of the line.
uint64_t pnm_number(const Bytes& file, uint64_t& at) {
  constexpr int kMostDigits = 10;
  uint64_t value = 0;
  for (int digits = 0;; file.step()) {
    const uint8_t byte = file[at++];
    if (byte == '#') {
      while (file[at] != '\n' && file[at] != '\r') {
        file.step();
        ++at;
      }
      ++at;
    } else if (is_space(byte)) {
      if (digits) return value;
    } else {
      if (byte < '0' || byte > '9' || ++digits > kMostDigits) throw NoImage{};
      value = value * 10 + (byte - '0');
    }
  }
}

}  // namespace

ImageHeader bmp(const Bytes& file) { return dib(file, 14); }

ImageHeader ico(const Bytes& file) {
  const uint64_t count = file.little(4, 2);
  if (count == 0) throw NoImage{};
  IconEntry first = IconEntry::at(file, 6);
  for (uint64_t i = 1; i < count; ++i) {
    const IconEntry entry = IconEntry::at(file, 6 + 16 * i);
    if (entry.goes_before(first)) first = entry;
  }
  // The image itself, not the directory, says how large it will be.
  if (file.has(first.offset, "\x89PNG\r\n\x1a\n")) {
    return {"ICO", file.big(first.offset + 16, 4), file.big(first.offset + 20, 4), 1};
  }
  const ImageHeader bitmap = dib(file, first.offset);
  return {"ICO", bitmap.width, bitmap.height / 2, 1};  // the lower half is a mask
}

ImageHeader qoi(const Bytes& file) { return {"QOI", file.big(4, 4), file.big(8, 4), 1}; }

// P1 to P6, and what else Pillow reads: Pf (floats) and its own P0CMYK, PyP, PyRGBA and PyCMYK.
ImageHeader pnm(const Bytes& file) {
  const uint8_t kind = file[1];
  uint64_t at = 2;
  if (kind == '0' || kind == 'y') {
    constexpr std::string_view kExtensions[] = {"P0CMYK", "PyRGBA", "PyCMYK", "PyP"};
    at = 0;
    for (const std::string_view magic : kExtensions) {
      if (at == 0 && file.has(0, magic)) at = magic.size();
    }
    if (at == 0) throw NoImage{};
  } else if (!(kind >= '1' && kind <= '6') && kind != 'f') {
    throw NoImage{};
  }
  if (at < 6 && !is_space(file[at])) throw NoImage{};
  const uint64_t width = pnm_number(file, at);
  return {"PPM", width, pnm_number(file, at), 1};
}

ImageHeader tga(const Bytes& file) {
  const uint8_t map = file[1], kind = file[2], depth = file[16];
  const bool has_depth = depth == 1 || depth == 8 || depth == 16 || depth == 24 || depth == 32;
  const bool has_kind = (kind & ~8) >= 1 && (kind & ~8) <= 3;  // 8: run lengths
  if (map > 1 || !has_depth || !has_kind) throw NoImage{};
  return {"TGA", file.little(12, 2), file.little(14, 2), 1};
}

}  // namespace rtp_mm::probing
