#pragma once

#include <cuda_runtime_api.h>

#include "vision_grid.h"

namespace rtp_mm {

// One warp a cell. The pointers are the device's; `cells` is the host's count of what grid_thw holds. A position past
// the angles' stops the kernel with a trap.
cudaError_t launch_vision_positions(const VisionBatch& batch, int64_t cells, const RotaryAngles& angles,
                                    const VisionPositions& out, cudaStream_t stream);

}  // namespace rtp_mm
