// What a tower does between its products, each in one pass over memory. A row's bits depend on that row alone.

#pragma once

#include <cstdint>

#include "cpu/activation.h"
#include "cpu/float_formats.h"
#include "cpu/isa.h"

namespace rtp_mm {

// x += delta, where there is one, then out = (x - mean) / sqrt(variance + eps) * weight + bias: LayerNorm; or, without
// bias, out = x / sqrt(mean(x^2) + eps) * weight: RMSNorm. Delta, Out: float or BFloat16.
template <class Delta, class Out>
struct AddNorm {
  float* x;            // [rows, dim]
  const Delta* delta;  // [rows, dim] or null
  const float* weight;
  const float* bias;  // or null
  int64_t dim;
  float eps;
  Out* out;  // [rows, dim]
  Isa isa;
  int64_t out_stride = dim;  // from row to row

  void run(int64_t begin, int64_t end) const;  // rows
};

// The rotary embedding of q and k, in place. Element: float or BFloat16.
template <class Element>
struct RotateQk {
  Element* qkv;                                  // [rows, 3, heads, dim], dim contiguous
  int64_t row_stride, part_stride, head_stride;  // in elements
  const float *cos, *sin;                        // [rows, dim / 2]
  int64_t heads, dim;
  Isa isa;

  void run(int64_t begin, int64_t end) const;
};

// x = activation(x). Activation: kGelu or kQuickGelu.
template <class Element>
struct Activate {
  Element* x;  // [rows, dim]
  int64_t dim;
  Activation activation;
  Isa isa;

  void run(int64_t begin, int64_t end) const;
};

// out = silu(gate) * up.
template <class Element>
struct SiluGate {
  const Element* gate_up;  // [rows, 2 * dim], gates before ups
  int64_t dim;
  Element* out;  // [rows, dim]
  Isa isa;

  void run(int64_t begin, int64_t end) const;
};

}  // namespace rtp_mm
