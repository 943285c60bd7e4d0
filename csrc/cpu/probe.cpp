// Which format a file is of; its header is read in probe_*.cpp.

#include "cpu/probe.h"

#include <stdexcept>
#include <string_view>
#include <utility>

#include "cpu/probe_formats.h"

namespace rtp_mm {
namespace probing {
namespace {

using namespace std::literals;

struct Signature {
  std::string_view text;
  HeaderReader* read;
  uint64_t offset = 0;
};

constexpr Signature kSignatures[] = {
    {"\xff\xd8\xff"sv, jpeg},
    {"\x89PNG\r\n\x1a\n"sv, png},
    {"WEBPVP8"sv, webp, 8},
    {"GIF87a"sv, gif},
    {"GIF89a"sv, gif},
    {"BM"sv, bmp},
    {"II\x2a\0"sv, tiff},
    {"MM\0\x2a"sv, tiff},
    {"II\x2b\0"sv, tiff},
    {"MM\0\x2b"sv, tiff},
    {"II\0\x2a"sv, tiff},  // wrong, and read all the same, as Pillow does
    {"MM\x2a\0"sv, tiff},
    {"ftyp"sv, heif, 4},
    {"\0\0\0\x0cjP  \r\n\x87\n"sv, jpeg2000_boxes},
    {"\xff\x4f\xff\x51"sv, jpeg2000_codestream},
    {"\0\0\1\0"sv, ico},
    {"qoif"sv, qoi},
    {"P"sv, pnm},
    {""sv, tga},  // which has none: whatever the others leave
};

constexpr std::pair<std::string_view, AnimationReader*> kAnimations[] = {
    {"PNG", png_animation}, {"GIF", gif_animation}, {"WEBP", webp_animation}, {"AVIF", avif_animation}};

ProbeResult attempt(HeaderReader* read, const uint8_t* data, size_t size) {
  try {
    const ImageHeader header = read(Bytes(data, size));
    if (header.width && header.height) return header;
  } catch (EndsEarly ending) {
    return NeedsMore{ending.needed};
  } catch (NoImage) {
  }
  return {};
}

}  // namespace
}  // namespace probing

ProbeResult probe(const uint8_t* data, size_t size) {
  const probing::Bytes file(data, size);
  for (const probing::Signature& signature : probing::kSignatures) {
    if (!file.begins_with(signature.text, signature.offset)) continue;
    const ProbeResult result = probing::attempt(signature.read, data, size);
    if (!std::holds_alternative<std::monostate>(result)) return result;
  }
  return {};
}

Animation read_animation(const uint8_t* data, size_t size) {
  const ProbeResult result = probe(data, size);
  const auto* header = std::get_if<ImageHeader>(&result);
  for (const auto& [format, read] : probing::kAnimations) {
    if (!header || header->format != format) continue;
    try {
      const Animation animation = read(probing::Bytes(data, size, probing::kNoEnd), *header);
      if (animation.milliseconds.empty()) throw std::invalid_argument("it holds no frame");
      return animation;
    } catch (probing::EndsEarly) {
      throw std::invalid_argument("the file ends within a block");
    } catch (probing::NoImage) {
      break;
    }
  }
  throw std::invalid_argument("its headers are broken");
}

}  // namespace rtp_mm
