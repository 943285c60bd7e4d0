// The header probe on any bytes: it stays within them (a heap block of their exact size), its answer is well-formed,
// and that of a file's beginning is that of the file, or asks for more. The same for the frames of an animation: as
// many as the probe counts, on a canvas no smaller, or a word of what is wrong. And for the scans of a JPEG.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string_view>

#include "cpu/probe.h"

namespace rtp_mm {
namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

std::unique_ptr<uint8_t[]> exactly(const uint8_t* data, size_t size) {
  std::unique_ptr<uint8_t[]> block(new uint8_t[size]);
  std::copy_n(data, size, block.get());
  return block;
}

ProbeResult probe_exactly(const uint8_t* data, size_t size) {
  const auto block = exactly(data, size);
  const ProbeResult result = probe(block.get(), size);
  if (const auto* more = std::get_if<NeedsMore>(&result)) require(more->bytes > size);
  if (const auto* header = std::get_if<ImageHeader>(&result)) require(header->width > 0 && header->height > 0);
  return result;
}

void check_beginning(const ProbeResult& beginning, const ProbeResult& whole) {
  if (std::holds_alternative<NeedsMore>(beginning)) return;
  require(beginning.index() == whole.index());
  if (const auto* now = std::get_if<ImageHeader>(&beginning)) {
    const auto& then = std::get<ImageHeader>(whole);
    require(std::string_view(now->format) == then.format && now->width == then.width && now->height == then.height);
    require(now->frames == 0 || now->frames == then.frames);
  }
}

void check_animation(const uint8_t* data, size_t size, const ProbeResult& whole) {
  const auto block = exactly(data, size);
  try {
    const Animation animation = read_animation(block.get(), size);
    const auto& header = std::get<ImageHeader>(whole);
    require(animation.width >= header.width && animation.height >= header.height);
    require(!animation.milliseconds.empty());
    for (const double shown : animation.milliseconds) require(std::isfinite(shown) && shown >= 0);
    // Of an AVIF's track the probe tells, even where Pillow shows an item.
    const bool is_told = header.frames && std::string_view(header.format) != "AVIF";
    require(!is_told || header.frames == animation.milliseconds.size());
  } catch (const std::invalid_argument&) {
  }
}

void check_scans(const uint8_t* data, size_t size) {
  const auto block = exactly(data, size);
  size_t scans = 0;
  for (size_t i = 1; i < size; ++i) scans += data[i - 1] == 0xff && data[i] == 0xda;
  require(count_jpeg_scans(block.get(), size) == scans);
}

}  // namespace
}  // namespace rtp_mm

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const rtp_mm::ProbeResult whole = rtp_mm::probe_exactly(data, size);
  rtp_mm::check_animation(data, size, whole);
  rtp_mm::check_scans(data, size);
  // Where files are cut: at the input's choice, its last byte, and where the probe says that it stopped.
  size_t cut = size ? data[size - 1] * size / 256 : 0;
  for (int i = 0; i < 8 && cut < size; ++i) {
    const rtp_mm::ProbeResult beginning = rtp_mm::probe_exactly(data, cut);
    rtp_mm::check_beginning(beginning, whole);
    const auto* more = std::get_if<rtp_mm::NeedsMore>(&beginning);
    if (!more) break;
    cut = more->bytes;
  }
  return 0;
}
