// Bits of a JPEG, and the code that they are written in (ITU-T T.81, annexes C and F).

#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

#include "cpu/isa.h"

namespace rtp_mm {

// The next bits of a segment, the first one on top.
class JpegBits {
 public:
  explicit JpegBits(const uint8_t* bytes) : next_(bytes) {}

  // At least 56 bits are there from now on. Reads up to 8 bytes past those that are used.
  RTP_MM_INLINE void refill() {
    uint64_t bytes;
    std::memcpy(&bytes, next_, 8);
    if constexpr (std::endian::native == std::endian::little) bytes = __builtin_bswap64(bytes);
    bits_ |= bytes >> count_;
    next_ += (63 - count_) >> 3;
    count_ |= 56;
  }

  RTP_MM_INLINE uint64_t peek() const { return bits_; }

  RTP_MM_INLINE void skip(unsigned count) {
    bits_ <<= count;
    count_ -= count;
  }

  RTP_MM_INLINE unsigned bit() {
    if (count_ == 0) refill();
    const auto first = static_cast<unsigned>(bits_ >> 63);
    skip(1);
    return first;
  }

  // Where the next bit is, in bits from `begin` on.
  int64_t place(const uint8_t* begin) const { return (next_ - begin) * 8 - static_cast<int64_t>(count_); }

 private:
  const uint8_t* next_;
  uint64_t bits_ = 0;
  unsigned count_ = 0;
};

// A code word and the value behind it, which says how far it is to the next coefficient that is told, and what that is.
struct JpegSymbol {
  uint8_t bits;     // of both
  uint8_t advance;  // coefficients
  int16_t value;

  // In place of an advance: nothing but zeros follows, in as many blocks as the value says if the file is progressive;
  // or the file is broken. Added to at most 62, they stay apart from all that leads to a coefficient, and from each
  // other.
  static constexpr uint8_t kEndOfBlock = 128, kInvalid = 192;
};

class HuffmanTable {
 public:
  // What symbols say: the size of a difference; a run of zeros and a size; the same, or how many blocks end here.
  enum Kind { kDc, kAc, kProgressiveAc };

  // counts: of words of 1 to 16 bits; symbols: all of them, the shortest words first. False for what is no code.
  bool build(const uint8_t* counts, const uint8_t* symbols, Kind kind);

  RTP_MM_INLINE JpegSymbol find(uint64_t peeked) const {
    const JpegSymbol symbol = by_bits_[peeked >> (64 - kLookBits)];
    return __builtin_expect(symbol.bits != 0, 1) ? symbol : find_long(peeked);
  }

 private:
  static constexpr int kLookBits = 11;  // 8 KB each, a few of which stay in L1; few words are longer with their values

  struct Word {
    uint8_t bits, value_bits, advance;
    bool is_run;  // of ends of blocks, whose number is the value

    JpegSymbol with_value(uint64_t peeked) const;
  };

  static Word word_of(uint8_t symbol, uint8_t length, Kind kind);

  JpegSymbol find_long(uint64_t peeked) const;

  std::array<JpegSymbol, 1 << kLookBits> by_bits_;  // no bits where a word and its value have more
  std::array<uint32_t, 17> ends_;                   // by length: the first 16 bits of all words up to it are less
  std::array<int32_t, 17> offsets_;                 // by length: from a word to its place among all
  std::array<Word, 256> words_;
};

}  // namespace rtp_mm
