// What stands ahead of a JPEG's samples (ITU-T T.81, annex B), for files of the plainer kinds, which most are.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/jpeg_huffman.h"

namespace rtp_mm {

// Thrown for a file that is not of those kinds, or broken in any way, or of which decoders might think differently: it
// is another decoder's to judge.
struct UncertainJpeg {};

inline void require(bool condition) {
  if (!condition) throw UncertainJpeg{};
}

// Part of a scan's bits, up to a restart marker or the end: bytes [begin, end) of `JpegFile::bits`.
struct JpegSegment {
  size_t begin, end;
};

// Coefficients [first, last] in zigzag order, of one component or of all of them.
struct JpegScan {
  int component, count;  // the first one, and how many
  int first, last;
  int high, low;  // bits below those that earlier scans gave (0: there was none), and below those that this one gives
  std::array<std::shared_ptr<const HuffmanTable>, 3> dc, ac;  // by component, where the scan has use for them
  int64_t segment_mcus;                                       // in all segments but the last
  std::vector<JpegSegment> segments;
};

// Blocks of 8x8 samples come in MCUs: one of each chroma component, and of luma as many as lie over it. In a scan of
// one component a block is an MCU.
struct JpegFile {
  int64_t width, height;
  int64_t across, down;                        // samples of luma to one of chroma: 1 or 2
  std::vector<std::array<uint8_t, 64>> steps;  // of quantisation, in zigzag order, by component: grey, or Y, Cb and Cr
  int64_t mcus_across, mcus_down;
  bool is_progressive;
  std::vector<JpegScan> scans;      // a single one of all coefficients where it is not progressive
  std::unique_ptr<uint8_t[]> bits;  // without stuffed bytes and markers; kBitsPadding zeros follow

  int components() const { return static_cast<int>(steps.size()); }
};

// More bytes than an MCU has: 6 blocks of 64 values, of 30 bits each.
constexpr size_t kBitsPadding = 2048;

// Reads a file that is sequential, of one scan, or progressive (SOF0, SOF1, SOF2), by Huffman's code, of 8 bits a
// sample, grey or YCbCr, chroma of full or half size. Throws UncertainJpeg.
JpegFile read_jpeg(const uint8_t* data, size_t size);

}  // namespace rtp_mm
