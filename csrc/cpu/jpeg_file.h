// What stands ahead of a JPEG's samples (ITU-T T.81, annex B), for files of the plainest kind, which most are.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/jpeg_huffman.h"

namespace rtp_mm {

// Thrown for a file that is not of that kind, or broken in any way, or of which decoders might think differently: it is
// another decoder's to judge.
struct UncertainJpeg {};

inline void require(bool condition) {
  if (!condition) throw UncertainJpeg{};
}

struct JpegComponent {
  std::array<uint8_t, 64> steps;  // of quantisation, in zigzag order
  HuffmanTable dc, ac;
};

// Part of the samples' bits, up to a restart marker or the end: bytes [begin, end) of `JpegFile::bits`.
struct JpegSegment {
  size_t begin, end;
};

// Blocks of 8x8 samples come in MCUs: one of each chroma component, and of luma as many as lie over it.
struct JpegFile {
  int64_t width, height;
  int64_t across, down;                   // samples of luma to one of chroma: 1 or 2
  std::vector<JpegComponent> components;  // grey, or Y, Cb and Cr
  int64_t mcus_across, mcus_down;
  int64_t segment_mcus;  // in all segments but the last
  std::vector<JpegSegment> segments;
  std::unique_ptr<uint8_t[]> bits;  // without stuffed bytes and markers; kBitsPadding zeros follow
};

// More bytes than an MCU has: 6 blocks of 64 values, of 27 bits each.
constexpr size_t kBitsPadding = 2048;

// Reads a file of one scan that is sequential and by Huffman's code (SOF0, SOF1), of 8 bits a sample, grey or YCbCr,
// chroma of full or half size. Throws UncertainJpeg.
JpegFile read_jpeg(const uint8_t* data, size_t size);

}  // namespace rtp_mm
