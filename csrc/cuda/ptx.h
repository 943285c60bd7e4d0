// The instructions that CUDA C++ has no name for, sm_80 and up. tests/cpp/cuda_on_cpu has their meaning in C++.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace rtp_mm {

// Copies kBytes, 4, 8 or 16, from global to shared memory in the background, both aligned to as many: the first `there`
// bytes, then zeros.
template <int kBytes>
__device__ void copy_async(void* shared, const void* global, int there) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(there) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(there)
                 : "memory");
  }
}

// Closes a group of copies of this thread.
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread but the last kRunning.
template <int kRunning>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kRunning) : "memory");
}

// sums [16, 8] += a [16, 16] * b [16, 8] over a warp, with float32 sums. Lane 4 g + t holds
//   a: (g, 2t) (g, 2t + 1), (g + 8, the same), (g, 2t + 8) (g, 2t + 9), (g + 8, the same); the first in the low half
//   b: (2t, g) (2t + 1, g), (2t + 8, g) (2t + 9, g)
//   sums: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
template <class Element>
__device__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply_add<__half>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two values at once: a - b, which must be exact.
template <class Element>
__device__ uint32_t subtract(uint32_t a, uint32_t b);

template <>
__device__ inline uint32_t subtract<__nv_bfloat16>(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(b), "r"(0xbf80bf80), "r"(a));  // sm_80 has no sub.bf16x2
  return out;
}

template <>
__device__ inline uint32_t subtract<__half>(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

}  // namespace rtp_mm
