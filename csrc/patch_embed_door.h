// The part of the door that patch embeddings of all devices share.

#pragma once

#include <optional>

#include "common.h"

namespace rtp_mm {

// Checks what is added to or said about the product [n, d] of rows and `weight`. Returns the rows of an order's group;
// 1 without an order.
inline int64_t check_patch_embed(const char* name, int64_t n, int64_t d, const Tensor& weight, const Tensor& bias,
                                 const std::optional<Tensor>& order, const std::optional<Tensor>& pos) {
  check(bias.dim() == 1 && bias.size(0) == d && bias.scalar_type() == ScalarType::Float && bias.is_contiguous(), name,
        ": bias must be contiguous [", d, "] float32, got ", describe(bias));
  check(!pos || (pos->dim() == 2 && pos->size(0) == n && pos->size(1) == d && pos->scalar_type() == ScalarType::Float &&
                 pos->is_contiguous()),
        name, ": pos must be contiguous [", n, ", ", d, "] float32, got ", pos ? describe(*pos) : "");
  check(bias.device() == weight.device() && (!order || order->device() == weight.device()) &&
            (!pos || pos->device() == weight.device()),
        name, ": rows, weight, bias, order and pos must be on one device");
  if (!order) return 1;
  const int64_t groups = order->dim() == 1 ? order->size(0) : 0;
  check(order->dim() == 1 && order->scalar_type() == ScalarType::Int && order->is_contiguous() &&
            (groups ? n % groups == 0 : n == 0),
        name, ": order must be contiguous [N / group] int32 with N = ", n, ", got ", describe(*order));
  return groups ? n / groups : 1;
}

}  // namespace rtp_mm
