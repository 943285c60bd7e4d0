// In place of csrc/cuda/ptx.h: the same functions in C++, lane by lane as PTX's manual lays them out.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstring>

namespace rtp_mm {

template <int kBytes>
void copy_async(void* shared, const void* global, int there) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  if (address(shared) % kBytes || address(global) % kBytes || there < 0 || there > kBytes) __trap();
  std::memset(shared, 0, kBytes);
  std::memcpy(shared, global, there);
}

inline void close_copies() {}

template <int kRunning>
void wait_copies() {}

// The low or high half of a register as an element.
template <class Element>
float half_of(uint32_t pair, int64_t index) {
  Element element;
  element.bits = static_cast<uint16_t>(pair >> 16 * index);
  return to_float(element);
}

template <class Element>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Exchange<Operands> warp({{a[0], a[1], a[2], a[3]}, {b0, b1}});
  for (int i = 0; i < 4; ++i) {
    const int row = warp.lane / 4 + i / 2 * 8, column = warp.lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t x = warp.of(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
      const uint32_t w = warp.of(column * 4 + k % 8 / 2).b[k / 8];
      sums[i] += half_of<Element>(x, k % 2) * half_of<Element>(w, k % 2);
    }
  }
}

template <class Element>
uint32_t subtract(uint32_t a, uint32_t b) {
  uint32_t out = 0;
  for (int64_t i = 0; i < 2; ++i) {
    const float exact = half_of<Element>(a, i) - half_of<Element>(b, i);
    const Element rounded = round_to<Element>(exact);
    if (to_float(rounded) != exact) __trap();
    out |= static_cast<uint32_t>(rounded.bits) << 16 * i;
  }
  return out;
}

}  // namespace rtp_mm
