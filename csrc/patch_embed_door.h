// The door of patch_embed, one for all devices: checks the arguments.

#pragma once

#include <optional>

#include "common.h"

namespace rtp_mm {

// The rows of an order's group; 1 without an order.
inline int64_t check_patch_embed(const Tensor& rows, const Tensor& weight, const Tensor& bias,
                                 const std::optional<Tensor>& order, const std::optional<Tensor>& pos,
                                 ScalarType out_dtype) {
  check(rows.dim() == 2 && rows.scalar_type() == ScalarType::Byte && rows.is_contiguous(),
        "patch_embed: rows must be contiguous [N, K] uint8, got ", describe(rows));
  check(weight.dim() == 3 && (weight.size(0) == 1 || weight.size(0) == 2) && weight.size(2) == rows.size(1) &&
            is_float(weight.scalar_type()) && (weight.size(2) <= 1 || weight.stride(2) == 1),
        "patch_embed: weight must be [1 or 2, D, ", rows.size(1),
        "] float32, bfloat16 or float16, the last dimension contiguous, got ", describe(weight));
  check(bias.dim() == 1 && bias.size(0) == weight.size(1) && bias.scalar_type() == ScalarType::Float &&
            bias.is_contiguous(),
        "patch_embed: bias must be contiguous [", weight.size(1), "] float32, got ", describe(bias));
  check(!pos || (pos->dim() == 2 && pos->size(0) == rows.size(0) && pos->size(1) == weight.size(1) &&
                 pos->scalar_type() == ScalarType::Float && pos->is_contiguous()),
        "patch_embed: pos must be contiguous [", rows.size(0), ", ", weight.size(1), "] float32, got ",
        pos ? describe(*pos) : "");
  check(is_float(out_dtype), "patch_embed: out_dtype must be float32, bfloat16 or float16, got ",
        dtype_name(out_dtype));
  check(weight.device() == rows.device() && bias.device() == rows.device() &&
            (!order || order->device() == rows.device()) && (!pos || pos->device() == rows.device()),
        "patch_embed: rows, weight, bias, order and pos must be on one device");
  if (!order) return 1;
  const int64_t n = rows.size(0);
  check(order->dim() == 1 && order->scalar_type() == ScalarType::Int && order->is_contiguous() &&
            (order->size(0) ? n % order->size(0) == 0 : n == 0),
        "patch_embed: order must be contiguous [N / group] int32 with N = ", n, ", got ", describe(*order));
  return n ? n / order->size(0) : 1;
}

}  // namespace rtp_mm
