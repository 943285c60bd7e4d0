#include "cuda/launch.h"
#include "cuda/vision_positions.h"
#include "vision_positions_door.h"

namespace rtp_mm {
namespace {

// The grid's values stay on the device: that cells, windows and frames are theirs is the caller's word.
VisionTensors vision_positions_cuda(const Tensor& grid_thw, const Tensor& angles, int64_t cells, int64_t windows,
                                    int64_t frames, int64_t merge_size, int64_t window) {
  const VisionBatch batch = check_vision_batch(grid_thw, angles, cells, windows, frames, merge_size, window);
  const CudaScope cuda(grid_thw);
  VisionTensors out = new_vision_tensors(grid_thw, angles, cells, windows, frames, merge_size, window);
  check_launch("vision_positions",
               launch_vision_positions(batch, cells, rotary_angles(angles), pointers(out), cuda.stream()));
  return out;
}

}  // namespace
}  // namespace rtp_mm

STABLE_TORCH_LIBRARY_IMPL(rtp_mm, CUDA, m) { m.impl("vision_positions", TORCH_BOX(&rtp_mm::vision_positions_cuda)); }
