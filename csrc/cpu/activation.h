// The activations of a tower's linear layers, in vectors.

#pragma once

#include "cpu/simd.h"

namespace rtp_mm {

enum class Activation { kNone, kGelu, kQuickGelu, kSiluGate };

// Of those that need no gate.
template <class Arch>
RTP_MM_INLINE Vector<Arch> activated(Vector<Arch> x, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return gelu<Arch>(x);
    case Activation::kQuickGelu:
      return sigmoid_gate<Arch>(x, 1.702f);
    default:
      return x;
  }
}

template <class Arch>
RTP_MM_INLINE Vector<Arch> silu_gate(Vector<Arch> gate, Vector<Arch> up) {
  return sigmoid_gate<Arch>(gate, 1.0f) * up;
}

}  // namespace rtp_mm
