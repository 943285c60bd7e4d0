// The activations of a tower's linear layers, in vectors.

#pragma once

#include <type_traits>

#include "cpu/simd.h"

namespace rtp_mm {

enum class Activation { kNone, kGelu, kQuickGelu, kSiluGate };

// Whether a rough one will do: rounding to bfloat16 adds an error of 4e-3.
template <class Out>
constexpr bool kMayBeRough = std::is_same_v<Out, BFloat16>;

// Of those that need no gate.
template <class Arch, class Out>
RTP_MM_INLINE Vector<Arch> activated(Vector<Arch> x, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return gelu<Arch, kMayBeRough<Out>>(x);
    case Activation::kQuickGelu:
      return sigmoid_gate<Arch, kMayBeRough<Out>>(x, 1.702f);
    default:
      return x;
  }
}

template <class Arch, class Out>
RTP_MM_INLINE Vector<Arch> silu_gate(Vector<Arch> gate, Vector<Arch> up) {
  return sigmoid_gate<Arch, kMayBeRough<Out>>(gate, 1.0f) * up;
}

}  // namespace rtp_mm
