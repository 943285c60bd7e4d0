// Answers questions on stdin with the algorithms that know no torch, in bytes on stdout, so that what a CPU of another
// kind computes can be compared with what this one does:
//
//   resize   Resize, pixels           rows, once for every level, from the slowest; bytes that are not written: 7
//   png      Png, filtered rows       a byte, 1 if all filters are known, and the pixels (zeros if not)
//   jpeg     number of bytes, file    a byte, 1 if it is sure of the file, and the pixels
//   white    number of pixels, RGBA   RGB
//   probe    number of bytes, file    a line: "format width height frames", "more bytes" or "unknown"

#include <array>
#include <cstdint>
#include <cstdio>
#include <string_view>
#include <variant>
#include <vector>

#include "check.h"
#include "cpu/jpeg_source.h"
#include "cpu/over_white.h"
#include "cpu/png_rows.h"
#include "cpu/probe.h"
#include "cpu/resize.h"

namespace rtp_mm {
namespace {

// kCount numbers, or nothing at the end of the questions.
template <size_t kCount>
bool read(std::array<int64_t, kCount>& numbers) {
  return std::fread(numbers.data(), sizeof(int64_t), kCount, stdin) == kCount;
}

std::vector<uint8_t> read_bytes(int64_t count) {
  std::vector<uint8_t> bytes(count);
  CHECK(std::fread(bytes.data(), 1, bytes.size(), stdin) == bytes.size());
  return bytes;
}

void write(const std::vector<uint8_t>& bytes) {
  CHECK(std::fwrite(bytes.data(), 1, bytes.size(), stdout) == bytes.size());
}

void resize() {
  for (std::array<int64_t, 12> question; read(question);) {
    const auto& [height, width, row_stride, pixel_stride, out_height, out_width, patch, merge, temporal, slot, filter,
                 is_vertical_first] = question;
    const std::vector<uint8_t> pixels = read_bytes((height - 1) * row_stride + (width - 1) * pixel_stride + 3);
    for (int level = 0; level <= static_cast<int>(best_resize_level()); ++level) {
      std::vector<uint8_t> rows(out_height * out_width * 3 * temporal, 7);
      resize_patchify({pixels.data(), height, width, row_stride, pixel_stride},
                      {out_height, out_width, patch, merge, temporal, slot, ResizeFilter(filter),
                       is_vertical_first == 1, ResizeLevel(level)},
                      rows.data());
      write(rows);
    }
  }
}

void png() {
  for (std::array<int64_t, 3> question; read(question);) {
    const auto& [height, row_bytes, pixel_bytes] = question;
    const std::vector<uint8_t> filtered = read_bytes(height * (row_bytes + 1));
    std::vector<uint8_t> rows(height * row_bytes);
    write({unfilter_png(filtered.data(), height, row_bytes, pixel_bytes, rows.data())});
    write(rows);
  }
}

void jpeg() {
  for (std::array<int64_t, 1> bytes; read(bytes);) {
    const std::vector<uint8_t> data = read_bytes(bytes[0]);
    try {
      const JpegFile file = read_jpeg(data.data(), data.size());
      std::vector<uint8_t> pixels(file.height * file.width * 3);
      decode_jpeg(file, pixels.data());
      write({1});
      write(pixels);
    } catch (const UncertainJpeg&) {
      write({0});
    }
  }
}

void white() {
  for (std::array<int64_t, 1> pixels; read(pixels);) {
    const std::vector<uint8_t> rgba = read_bytes(4 * pixels[0]);
    std::vector<uint8_t> rgb(3 * pixels[0]);
    over_white(rgba.data(), pixels[0], rgb.data());
    write(rgb);
  }
}

void probe_files() {
  for (std::array<int64_t, 1> bytes; read(bytes);) {
    const std::vector<uint8_t> file = read_bytes(bytes[0]);
    const ProbeResult result = probe(file.data(), file.size());
    if (const auto* header = std::get_if<ImageHeader>(&result)) {
      std::printf("%s %llu %llu %llu\n", header->format, static_cast<unsigned long long>(header->width),
                  static_cast<unsigned long long>(header->height), static_cast<unsigned long long>(header->frames));
    } else if (const auto* more = std::get_if<NeedsMore>(&result)) {
      std::printf("more %llu\n", static_cast<unsigned long long>(more->bytes));
    } else {
      std::printf("unknown\n");
    }
  }
}

}  // namespace
}  // namespace rtp_mm

int main(int count, char** arguments) {
  const std::string_view kind = count == 2 ? arguments[1] : "";
  if (kind == "resize") return rtp_mm::resize(), 0;
  if (kind == "png") return rtp_mm::png(), 0;
  if (kind == "jpeg") return rtp_mm::jpeg(), 0;
  if (kind == "white") return rtp_mm::white(), 0;
  if (kind == "probe") return rtp_mm::probe_files(), 0;
  return 2;
}
