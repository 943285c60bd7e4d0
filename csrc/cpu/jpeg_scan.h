// The bits of a scan, MCU by MCU, and the coefficients that they tell.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "cpu/jpeg_file.h"
#include "cpu/jpeg_huffman.h"
#include "cpu/jpeg_idct.h"

namespace rtp_mm {

constexpr uint8_t kZigzag[64] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
                                 41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
                                 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

constexpr int quad_place(int zigzag) { return kZigzag[zigzag] / 8 * kQuadRow + kZigzag[zigzag] % 8; }

// By zigzag order. Past it is its last place, to which the end of a block writes the 0 that is there.
constexpr auto kQuadPlaces = [] {
  std::array<uint8_t, 256> places{};
  for (int i = 0; i < 256; ++i) places[i] = static_cast<uint8_t>(quad_place(std::min(i, 63)));
  return places;
}();
static_assert(quad_place(63) < 256);

constexpr int kMostDc = 2047;  // which 8-bit samples cannot reach

class JpegScanReader {
 public:
  JpegScanReader(const JpegFile& file, const JpegScan& scan, int64_t mcus)
      : bits(nullptr), bytes_(file.bits.get()), scan_(scan), mcus_(mcus) {}

  JpegBits bits;

  // Ahead of every MCU: whether a segment begins, which knows nothing of those before.
  RTP_MM_INLINE bool next_mcu() {
    if (mcus_left_-- > 0) return false;
    next_segment();
    return true;
  }

  // Behind every MCU: whether all bits that have been read are the segment's.
  bool is_within() const { return bits_left() >= 0; }

  // At the end of a segment: no byte is left that nobody asked for.
  void finish() const { require(bits_left() >= 0 && bits_left() < 8); }

 private:
  int64_t bits_left() const { return 8 * static_cast<int64_t>(scan_.segments[segments_ - 1].end) - bits.place(bytes_); }

  void next_segment() {
    if (segments_ > 0) finish();
    const int64_t done = static_cast<int64_t>(segments_) * scan_.segment_mcus;
    mcus_left_ = std::min(scan_.segment_mcus, mcus_ - done) - 1;
    bits = JpegBits(bytes_ + scan_.segments[segments_++].begin);
  }

  const uint8_t* bytes_;
  const JpegScan& scan_;
  int64_t mcus_, mcus_left_ = 0;  // of the scan, of this segment
  size_t segments_ = 0;           // begun so far
};

RTP_MM_INLINE JpegSymbol next_symbol(JpegBits& bits, const HuffmanTable& table) {
  const JpegSymbol symbol = table.find(bits.peek());
  bits.skip(symbol.bits);
  return symbol;
}

// The first coefficient is told by its difference from that of the block before. False for what is broken.
RTP_MM_INLINE bool read_dc(JpegBits& bits, const HuffmanTable& dc, int low, int& prediction, int16_t* quad) {
  const JpegSymbol symbol = next_symbol(bits, dc);
  prediction += symbol.value;
  const int value = prediction * (1 << low);
  quad[0] = static_cast<int16_t>(value);
  return symbol.advance == 1 && value >= -kMostDc && value <= kMostDc;
}

// A block's coefficients into its place in a quad of zeros. False for what is broken.
RTP_MM_INLINE bool read_block(JpegBits& bits, const HuffmanTable& dc, const HuffmanTable& ac, int& prediction,
                              int16_t* quad) {
  bits.refill();
  const bool is_valid = read_dc(bits, dc, 0, prediction, quad);
  unsigned place = 0;
  for (;;) {
    bits.refill();  // of twice 26 bits
    const JpegSymbol first = next_symbol(bits, ac);
    place += first.advance;
    quad[kQuadPlaces[place]] = first.value;
    if (place >= 63) break;
    const JpegSymbol second = next_symbol(bits, ac);
    place += second.advance;
    quad[kQuadPlaces[place]] = second.value;
    if (place >= 63) break;
  }
  return is_valid & (place == 63 || (place >= JpegSymbol::kEndOfBlock && place < JpegSymbol::kInvalid));
}

}  // namespace rtp_mm
