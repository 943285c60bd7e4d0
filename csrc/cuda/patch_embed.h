#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace rtp_mm {

// out[i] = scale * sum_k (rows[r(i), k] - 128) * weight[:, k] + bias + pos[i], in float32, rounded once. Pointers are
// the device's.
template <class Weight>
struct CudaPatchEmbed {
  const uint8_t* rows;
  const Weight* weight;
  const float* bias;
  const float* pos;
  const int32_t* order;
  float scale;
  int64_t n, k, d;
  int64_t group, terms;
  int64_t term_stride, column_stride;  // of the weight, in elements
};

// Weights of 16 bits go through the tensor cores where k is even and rows and columns start at multiples of 4 bytes
// (16 are faster); the rest goes without. Every sum runs over k in the same order and partial sums in one thread, so a
// row's bits depend neither on n nor on its place. An order value out of range stops the kernel with a trap.
// Weight, Out: float, __nv_bfloat16 or __half.
template <class Weight, class Out>
cudaError_t launch_patch_embed(const CudaPatchEmbed<Weight>& job, Out* out, cudaStream_t stream);

}  // namespace rtp_mm
