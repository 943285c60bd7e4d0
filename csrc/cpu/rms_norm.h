#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace rtp_mm {

// Rows of x[rows, dim] to out = x / sqrt(mean(x^2) + eps) * weight, each read from memory once.
void rms_norm(Isa isa, const float* x, const float* weight, int64_t rows, int64_t dim, float eps, float* out);

}  // namespace rtp_mm
