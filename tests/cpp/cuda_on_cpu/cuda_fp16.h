#pragma once

#include "float_values.h"

struct __half : rtp_mm::Float16 {};

template <>
inline __half rtp_mm::round_to<__half>(float value) {
  return {rtp_mm::round_to<rtp_mm::Float16>(value)};
}

inline float __half2float(__half value) { return rtp_mm::to_float(static_cast<rtp_mm::Float16>(value)); }
inline __half __float2half_rn(float value) { return rtp_mm::round_to<__half>(value); }
