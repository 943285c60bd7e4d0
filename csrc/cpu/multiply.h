// The inner loops of every matrix product: strips of rows, held in registers, times a panel of columns.

#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace rtp_mm {

// Steps of k in one strip. Longer sums are sums of such partial sums, which round less: half the error at k = 588. A
// panel of 32 columns (10 KB) and the strip that meets it (4 KB) share L1 with room to spare: 128 steps are a fifth
// slower on a busy machine. A divisor of the widths and head dimensions of many towers.
constexpr int64_t kStripDepth = 80;

// Columns come in multiples of this: a vector of the widest instruction set.
constexpr int64_t kColumnUnit = 16;

// sums[rows, columns] += strips[rows, depth] * panel[depth, columns], rows of the strips kStripDepth apart,
// depth <= kStripDepth. Each element is summed over the depth in order, whatever the other rows and columns.
void multiply(Isa isa, int64_t rows, int64_t columns, int64_t depth, const float* strips, const float* panel,
              int64_t panel_stride, float* sums, int64_t sums_stride);

}  // namespace rtp_mm
