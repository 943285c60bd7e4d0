#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/isa.h"
#include "cpu/jpeg_file.h"
#include "cpu/jpeg_idct.h"
#include "cpu/jpeg_progressive.h"
#include "cpu/jpeg_scan.h"

namespace rtp_mm {

// The pixels of a JPEG from top to bottom, byte for byte those of libjpeg-turbo with its own settings: the accurate
// inverse DCT, smooth chroma.
class JpegRows {
 public:
  // The file must outlive it. Throws UncertainJpeg.
  explicit JpegRows(const JpegFile& file, Isa isa = best_isa());

  // Decodes the next row of MCUs. Throws UncertainJpeg.
  void advance();

  // How many rows there are by now. The chroma of a row may come from below, from MCUs that are still to be decoded.
  int64_t ready() const;

  // One of the rows that the last advance() made ready, packed RGB. Writes up to kMargin bytes past its end.
  void write(int64_t y, uint8_t* rgb);

  static constexpr int64_t kMargin = 96;

 private:
  friend struct DecodeMcus;
  friend struct WriteRow;

  // Samples of a component in a row of MCUs, the last row of those before above them, and one more row below.
  struct Plane {
    std::vector<uint8_t> samples;
    int64_t stride, height;
    QuadSteps steps;

    uint8_t* row(int64_t y) { return samples.data() + (y + 1) * stride; }
  };

  int64_t mcu_height() const { return 8 * file_.down; }

  const JpegFile& file_;
  Isa isa_;
  std::vector<Plane> planes_;
  std::vector<uint16_t> sums_;
  std::array<std::vector<uint8_t>, 2> upsampled_;
  std::optional<JpegCoefficients> coefficients_;  // of a progressive file
  JpegScanReader reader_;                         // of another
  std::array<int, 3> predictions_{};
  int64_t mcu_rows_ = 0;  // decoded so far
};

}  // namespace rtp_mm
