// Which format a file is of; its header is read in probe_*.cpp.

#include "cpu/probe.h"

#include <algorithm>
#include <array>
#include <string_view>

#include "cpu/probe_formats.h"

namespace rtp_mm {
namespace probing {
namespace {

using namespace std::literals;

struct Signature {
  std::string_view text;
  uint64_t offset;
  ImageHeader (*read)(const Bytes& file);
};

constexpr std::array kSignatures = {
    Signature{"\xff\xd8\xff"sv, 0, jpeg},
    Signature{"\x89PNG\r\n\x1a\n"sv, 0, png},
    Signature{"WEBPVP8"sv, 8, webp},
    Signature{"GIF87a"sv, 0, gif},
    Signature{"GIF89a"sv, 0, gif},
    Signature{"BM"sv, 0, bmp},
    Signature{"II\x2a\0"sv, 0, tiff},
    Signature{"MM\0\x2a"sv, 0, tiff},
    Signature{"II\x2b\0"sv, 0, tiff},
    Signature{"MM\0\x2b"sv, 0, tiff},
    Signature{"II\0\x2a"sv, 0, tiff},  // wrong, and read all the same, as Pillow does
    Signature{"MM\x2a\0"sv, 0, tiff},
    Signature{"ftyp"sv, 4, heif},
    Signature{"\0\0\0\x0cjP  \r\n\x87\n"sv, 0, jpeg2000_boxes},
    Signature{"\xff\x4f\xff\x51"sv, 0, jpeg2000_codestream},
    Signature{"\0\0\1\0"sv, 0, ico},
    Signature{"qoif"sv, 0, qoi},
    Signature{"P"sv, 0, pnm},
    Signature{""sv, 0, tga},  // which has none: whatever the others leave
};

ProbeResult attempt(ImageHeader (*read)(const Bytes&), const uint8_t* data, size_t size) {
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

}  // namespace rtp_mm
