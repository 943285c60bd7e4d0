#pragma once

#include "cuda/patch_embed.h"

namespace rtp_mm {

// Whether the tensor cores can take the job, Weight being __nv_bfloat16 or __half: tiles are copied by 4 bytes or 16.
template <class Weight>
bool fits_tensor_cores(const CudaPatchEmbed<Weight>& job);

template <class Weight, class Out>
cudaError_t launch_patch_embed_mma(const CudaPatchEmbed<Weight>& job, Out* out, cudaStream_t stream);

}  // namespace rtp_mm
