#include "cpu/jpeg_huffman.h"

namespace rtp_mm {

JpegSymbol HuffmanTable::Word::with_value(uint64_t peeked) const {
  const auto magnitude = static_cast<int32_t>(peeked << bits >> 1 >> (63 - value_bits));
  const auto symbol_bits = static_cast<uint8_t>(bits + value_bits);
  if (is_run) return {symbol_bits, advance, static_cast<int16_t>((1 << value_bits) + magnitude)};
  const bool is_negative = value_bits > 0 && magnitude >> (value_bits - 1) == 0;
  return {symbol_bits, advance, static_cast<int16_t>(magnitude - (is_negative ? (1 << value_bits) - 1 : 0))};
}

// Sizes that samples of 8 bits cannot have are not taken for valid, nor are runs that sequential files have no use for.
HuffmanTable::Word HuffmanTable::word_of(uint8_t symbol, uint8_t length, Kind kind) {
  constexpr uint8_t kMostDcBits = 11, kMostAcBits = 10;
  const uint8_t zeros = symbol >> 4, value_bits = symbol & 15;
  const Word invalid{length, 0, JpegSymbol::kInvalid, false};
  if (kind == kDc) return value_bits <= kMostDcBits ? Word{length, value_bits, 1, false} : invalid;
  if (value_bits > 0 || zeros == 15) {
    return value_bits <= kMostAcBits ? Word{length, value_bits, static_cast<uint8_t>(zeros + 1), false} : invalid;
  }
  if (kind == kProgressiveAc) return {length, zeros, JpegSymbol::kEndOfBlock, true};
  return zeros == 0 ? Word{length, 0, JpegSymbol::kEndOfBlock, false} : invalid;
}

bool HuffmanTable::build(const uint8_t* counts, const uint8_t* symbols, Kind kind) {
  by_bits_ = {};
  uint32_t code = 0;
  int32_t count = 0;
  for (uint8_t length = 1; length <= 16; ++length, code *= 2) {
    if ((code + counts[length - 1]) >> length) return false;  // all ones are no word
    offsets_[length] = count - static_cast<int32_t>(code);
    for (int i = 0; i < counts[length - 1]; ++i, ++code, ++count) {
      if (kind == kDc && symbols[count] > 15) return false;
      const Word& word = words_[count] = word_of(symbols[count], length, kind);
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
