// bfloat16 and IEEE half to float32, exactly, and back, to nearest, ties to even; one value at a time.

#pragma once

#include <bit>
#include <cstdint>

#include "cpu/float_formats.h"

namespace rtp_mm {

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  uint32_t bits;
  if (magnitude < 0x0400) {  // zero and subnormal: multiples of 2^-24
    bits = std::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  } else {  // the exponent's bias goes from 15 to 127; infinity and NaN go up to the top
    bits = (magnitude << 13) + (magnitude < 0x7c00 ? 0x38000000 : 0x70000000);
  }
  return std::bit_cast<float>(sign | bits);
}

template <class Out>
Out round_to(float value);

template <>
inline float round_to<float>(float value) {
  return value;
}

template <>
inline BFloat16 round_to<BFloat16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>(bits >> 16 | 0x40)};  // NaN stays NaN
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline Float16 round_to<Float16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x47800000) {  // 2^16 and more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: added to 0.5, the FPU rounds to multiples of 2^-24
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {  // the exponent's bias goes from 127 to 15; a carry out of the fraction is right, up to infinity
    half = (magnitude - 0x38000000 + 0x0fff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace rtp_mm
