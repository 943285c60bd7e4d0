// Matrix products by AMX, whose registers are tiles of 16 rows of 64 bytes.
//
// Source: Intel's Software Developer's Manual, volumes 1 (18: AMX) and 2 (TDPBF16PS, TDPBUSD).

#pragma once

#include <cstdint>

#include "cpu/multiply.h"

namespace rtp_mm {

// A thread's tiles, in use while this lives: what products by tiles need around them. Nothing if not `is_used`.
class AmxTiles {
 public:
  explicit AmxTiles(bool is_used);
  ~AmxTiles();
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

 private:
  const bool is_used_;
};

// As `multiply`, with rows of `left` that many words apart. The depth and the columns are multiples of kAmxSide; rows
// are taken in as many, so `left` must be readable, and `sums` have room, up to the next multiple: what stands there is
// of no importance, and lost. Bytes are added exactly, bfloat16s in an order of their own: of each 16 words the lower
// halves' products, and the upper ones', are summed from 0 on, both sums added up, and that added to what was before.
void multiply_amx(const FourBytes* left, int64_t left_stride, const Product<FourBytes>& product, Ahead ahead);
void multiply_amx(const BFloat16Pair* left, int64_t left_stride, const Product<BFloat16Pair>& product, Ahead ahead);

}  // namespace rtp_mm
