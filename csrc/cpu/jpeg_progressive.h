#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa.h"
#include "cpu/jpeg_file.h"
#include "cpu/jpeg_idct.h"

namespace rtp_mm {

// All coefficients of a progressive file, which come in several scans, most important bits first (ITU-T T.81, annex G).
class JpegCoefficients {
 public:
  JpegCoefficients(const JpegFile& file, Isa isa);  // throws UncertainJpeg

  // Blocks [4 * quad, 4 * quad + 4) of a row of a component's blocks.
  const Quad& quad(int component, int64_t row, int64_t quad) const {
    const Plane& plane = planes_[component];
    return plane.values[row * plane.quads + quad];
  }

 private:
  friend struct ReadScan;

  struct Plane {
    std::vector<Quad> values;
    std::vector<uint64_t> known;  // by block: which coefficients are not 0, the first one on top
    int64_t quads;                // in a row
    int64_t across, down;         // blocks in an MCU
    int64_t columns, lines;       // blocks that have samples of the image

    int16_t* block(int64_t row, int64_t column) {
      return values[row * quads + column / kQuadBlocks].at + 8 * (column % kQuadBlocks);
    }
    uint64_t& known_of(int64_t row, int64_t column) { return known[row * quads * kQuadBlocks + column]; }
  };

  std::vector<Plane> planes_;
};

}  // namespace rtp_mm
