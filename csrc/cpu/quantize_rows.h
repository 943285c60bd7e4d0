#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/multiply.h"

namespace rtp_mm {

// x[rows, k] to bytes, each row by itself: x is close to scales[row] * (byte - 128), where a row's largest magnitude is
// 127 scales. strips: [steps][rows][strip_depth] words; a row is filled up to a multiple of kAmxSide words with zeros,
// that is 128. The scale of a row with a NaN is NaN, with an infinity, infinite. The same bits on every instruction
// set.
void quantize_rows(Isa isa, const float* x, int64_t rows, int64_t k, int64_t strip_depth, FourBytes* strips,
                   float* scales);

}  // namespace rtp_mm
