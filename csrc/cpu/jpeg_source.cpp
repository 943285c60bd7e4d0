#include "cpu/jpeg_source.h"

#include <algorithm>
#include <vector>

namespace rtp_mm {
namespace {

constexpr int64_t kChannels = 3;

}  // namespace

JpegSource::JpegSource(const JpegFile& file, const JpegWindow& window, Isa isa)
    : RowSource(window.height, window.width, kChannels),
      decoder_(file, isa),
      file_height_(file.height),
      top_(window.top),
      left_bytes_(kChannels * window.left),
      stride_(kChannels * file.width + std::max(JpegRows::kMargin, kReadAhead)),
      kept_(std::make_unique<uint8_t[]>(kKeptRows * stride_)) {}

Rows JpegSource::rows(int64_t begin, int64_t count, int64_t) {
  for (const int64_t end = std::min(begin + count, height); ready_ < end;) {
    decoder_.advance();
    for (const int64_t ready = std::min(decoder_.ready() - top_, height); ready_ < ready; ++ready_) {
      decoder_.write(top_ + ready_, row(ready_));
    }
  }
  for (int64_t y = height; y < begin + count; ++y) std::copy_n(row(height - 1), stride_, row(y));
  return {row(begin) + left_bytes_, stride_};
}

void JpegSource::finish() {
  while (decoder_.ready() < file_height_) decoder_.advance();
}

void decode_jpeg(const JpegFile& file, uint8_t* pixels, Isa isa) {
  JpegRows decoder(file, isa);
  const int64_t row_bytes = kChannels * file.width;
  std::vector<uint8_t> last_rows(row_bytes + JpegRows::kMargin);
  for (int64_t y = 0; y < file.height;) {
    decoder.advance();
    for (const int64_t ready = decoder.ready(); y < ready; ++y) {
      uint8_t* row = pixels + y * row_bytes;
      if ((file.height - 1 - y) * row_bytes >= JpegRows::kMargin) {
        decoder.write(y, row);
      } else {  // whose margin is not the image's
        decoder.write(y, last_rows.data());
        std::copy_n(last_rows.data(), row_bytes, row);
      }
    }
  }
}

}  // namespace rtp_mm
