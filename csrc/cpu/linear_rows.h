// Tensors whose rows a linear layer reads next.

#pragma once

#include <cstdint>

#include "common.h"
#include "cpu/isa.h"
#include "cpu/linear_panels.h"

namespace rtp_mm {

// [rows, columns], not written yet. Rows of bfloat16 lie as far apart as `packed_linear` wants them to, if it is for
// that; else it is contiguous.
inline Tensor new_rows(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype, bool for_linear) {
  const bool is_apart = for_linear && dtype == ScalarType::BFloat16;
  const int64_t stride = is_apart ? linear_row_stride(best_isa(), columns) : columns;
  Tensor out = torch::stable::new_empty(like, {rows, stride}, dtype);
  return stride == columns ? out : torch::stable::narrow(out, 1, 0, columns);
}

}  // namespace rtp_mm
