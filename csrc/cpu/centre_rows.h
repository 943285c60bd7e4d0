#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace rtp_mm {

using ByteRows = const uint8_t* const*;  // rows of bytes, each wherever it lies

// rows[count][k] less 128 as floats, [steps of k][count][kStripDepth].
void centre_rows(Isa isa, ByteRows rows, int64_t count, int64_t k, float* strips);

}  // namespace rtp_mm
