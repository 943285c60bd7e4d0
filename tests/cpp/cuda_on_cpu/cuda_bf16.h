#pragma once

#include "float_values.h"

struct __nv_bfloat16 : rtp_mm::BFloat16 {};

template <>
inline __nv_bfloat16 rtp_mm::round_to<__nv_bfloat16>(float value) {
  return {rtp_mm::round_to<rtp_mm::BFloat16>(value)};
}

inline float __bfloat162float(__nv_bfloat16 value) { return rtp_mm::to_float(static_cast<rtp_mm::BFloat16>(value)); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return rtp_mm::round_to<__nv_bfloat16>(value); }
