#include "cpu/vision_positions.h"
#include "vision_positions_door.h"

namespace rtp_mm {
namespace {

// On the CPU the values can be read, so they are checked too.
void check_grid(const VisionBatch& batch, int64_t positions, int64_t cells, int64_t windows, int64_t frames) {
  for (int64_t i = 0; i < batch.items; ++i) {
    const int64_t m = batch.merge_size, t = batch.grid_thw[3 * i], h = batch.grid_thw[3 * i + 1],
                  w = batch.grid_thw[3 * i + 2];
    check(t > 0 && h > 0 && w > 0 && h % m == 0 && w % m == 0 && h * w <= kMaxPatches / t, "vision_positions: grid ", i,
          " must be positive, with h and w divisible by ", m, " and fewer than 2^31 patches, got (", t, ", ", h, ", ",
          w, ")");
    check(h <= positions && w <= positions, "vision_positions: grid ", i, " needs the angles of ", h < w ? w : h,
          " positions, got ", positions);
  }
  const VisionItem end = batch_end(batch);
  check(end.first_cell == cells && end.first_window == windows && end.first_frame == frames,
        "vision_positions: the grids hold ", end.first_cell, " cells, ", end.first_window, " windows and ",
        end.first_frame, " frames, got ", cells, ", ", windows, " and ", frames);
}

VisionTensors vision_positions_cpu(const Tensor& grid_thw, const Tensor& angles, int64_t cells, int64_t windows,
                                   int64_t frames, int64_t merge_size, int64_t window) {
  const VisionBatch batch = check_vision_batch(grid_thw, angles, cells, windows, frames, merge_size, window);
  check_grid(batch, angles.size(1), cells, windows, frames);
  VisionTensors out = new_vision_tensors(grid_thw, angles, cells, windows, frames, merge_size, window);
  vision_positions(batch, rotary_angles(angles), pointers(out));
  return out;
}

}  // namespace
}  // namespace rtp_mm

STABLE_TORCH_LIBRARY_IMPL(rtp_mm, CPU, m) { m.impl("vision_positions", TORCH_BOX(&rtp_mm::vision_positions_cpu)); }
