#pragma once

#include <cstdint>
#include <memory>

#include "cpu/jpeg_rows.h"
#include "cpu/resize.h"

namespace rtp_mm {

// A part of a JPEG.
struct JpegWindow {
  int64_t top, left, height, width;
};

// Rows for a resize as they are decoded, of which no more than two bands are kept.
class JpegSource : public RowSource {
 public:
  // The file must outlive it. Throws UncertainJpeg.
  JpegSource(const JpegFile& file, const JpegWindow& window, Isa isa = best_isa());

  Rows rows(int64_t begin, int64_t count, int64_t reach) override;  // throws UncertainJpeg

  // Decodes what nobody asked for: the file may be broken there. Throws UncertainJpeg.
  void finish();

 private:
  // As many as wait for their band, up to one less than it has, and a row of MCUs makes ready, up to one more.
  static constexpr int64_t kKeptRows = 2 * kBandRows;

  uint8_t* row(int64_t y) { return kept_.get() + y % kKeptRows * stride_; }

  JpegRows decoder_;
  int64_t file_height_, top_, left_bytes_, stride_;
  std::unique_ptr<uint8_t[]> kept_;
  int64_t ready_ = 0;
};

// All pixels, packed RGB, to `pixels`. Throws UncertainJpeg.
void decode_jpeg(const JpegFile& file, uint8_t* pixels, Isa isa = best_isa());

}  // namespace rtp_mm
