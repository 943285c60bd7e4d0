#pragma once

#include <cstdint>

namespace rtp_mm {

// Undoes the filters of an inflated PNG image that is not interlaced (PNG specification, chapter 9): `height` rows,
// each a filter type and `row_bytes` bytes, to as many rows without the type. pixel_bytes: 1 to 4, from a byte to its
// left neighbour. Returns false, with rows unwritten, for a filter type that there is not.
bool unfilter_png(const uint8_t* filtered, int64_t height, int64_t row_bytes, int64_t pixel_bytes, uint8_t* rows);

}  // namespace rtp_mm
