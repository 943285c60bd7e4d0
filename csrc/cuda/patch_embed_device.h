// What the two kernels of patch_embed share.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/patch_embed.h"

namespace rtp_mm {

__device__ inline void store(float* dst, float value) { *dst = value; }
__device__ inline void store(__nv_bfloat16* dst, float value) { *dst = __float2bfloat16_rn(value); }
__device__ inline void store(__half* dst, float value) { *dst = __float2half_rn(value); }

// The row of `rows` that output row i comes from.
template <class Weight>
__device__ int64_t input_row(const CudaPatchEmbed<Weight>& job, int64_t i) {
  if (job.order == nullptr) return i;
  const int64_t group = job.order[i / job.group];
  if (group < 0 || group >= job.n / job.group) __trap();
  return group * job.group + i % job.group;
}

// The value at (row, column), ready to be rounded.
template <class Weight>
__device__ float finish(const CudaPatchEmbed<Weight>& job, int64_t row, int64_t column, float sum) {
  const float value = fmaf(job.scale, sum, job.bias[column]);
  return job.pos ? value + job.pos[row * job.d + column] : value;
}

}  // namespace rtp_mm
