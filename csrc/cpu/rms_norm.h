#pragma once

#include <cstdint>

#include "cpu/float_formats.h"
#include "cpu/isa.h"

namespace rtp_mm {

// Rows of x[rows, dim] to out = x / sqrt(mean(x^2) + eps) * weight, float or BFloat16, each read from memory once.
template <class Out>
void rms_norm(Isa isa, const float* x, const float* weight, int64_t rows, int64_t dim, float eps, Out* out);

}  // namespace rtp_mm
