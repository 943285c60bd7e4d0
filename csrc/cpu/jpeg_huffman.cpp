#include "cpu/jpeg_huffman.h"

namespace rtp_mm {

JpegSymbol HuffmanTable::Word::with_value(uint64_t peeked) const {
  const auto magnitude = static_cast<int32_t>(peeked << bits >> 1 >> (63 - value_bits));
  const bool is_negative = value_bits > 0 && magnitude >> (value_bits - 1) == 0;
  const int32_t value = magnitude - (is_negative ? (1 << value_bits) - 1 : 0);
  return {static_cast<uint8_t>(bits + value_bits), advance, static_cast<int16_t>(value)};
}

// Sizes that samples of 8 bits cannot have are not taken for valid, nor are runs that sequential files have no use for.
bool HuffmanTable::build(const uint8_t* counts, const uint8_t* symbols, bool is_dc) {
  constexpr int kMostDcBits = 11, kMostAcBits = 10;
  by_bits_ = {};
  uint32_t code = 0;
  int32_t count = 0;
  for (uint8_t length = 1; length <= 16; ++length, code *= 2) {
    offsets_[length] = count - static_cast<int32_t>(code);
    for (int i = 0; i < counts[length - 1]; ++i, ++code, ++count) {
      const uint8_t symbol = symbols[count], zeros = symbol >> 4, value_bits = symbol & 15;
      if (code >> length || (is_dc && zeros)) return false;
      Word& word = words_[count] = {length, value_bits, static_cast<uint8_t>(zeros + 1)};
      if (!is_dc && symbol == 0) {
        word.advance = JpegSymbol::kEndOfBlock;
      } else if (is_dc ? symbol > kMostDcBits : value_bits > kMostAcBits || (value_bits == 0 && zeros < 15)) {
        word = {length, 0, JpegSymbol::kInvalid};
      }
      if (length + word.value_bits > kLookBits) continue;
      const uint64_t first = uint64_t{code} << (kLookBits - length), last = uint64_t{code + 1} << (kLookBits - length);
      for (uint64_t bits = first; bits < last; ++bits) by_bits_[bits] = word.with_value(bits << (64 - kLookBits));
    }
    ends_[length] = code << (16 - length);
  }
  return true;
}

JpegSymbol HuffmanTable::find_long(uint64_t peeked) const {
  const auto bits = static_cast<uint32_t>(peeked >> 48);
  for (int length = 1; length <= 16; ++length) {
    if (bits < ends_[length]) {
      return words_[static_cast<int32_t>(bits >> (16 - length)) + offsets_[length]].with_value(peeked);
    }
  }
  return {1, JpegSymbol::kInvalid, 0};
}

}  // namespace rtp_mm
