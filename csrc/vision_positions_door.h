// The door of vision_positions, one for all devices: checks the arguments and makes room for the answers.

#pragma once

#include <initializer_list>
#include <limits>
#include <tuple>

#include "common.h"
#include "vision_grid.h"

namespace rtp_mm {

// Positions are int32.
constexpr int64_t kMaxPatches = std::numeric_limits<int32_t>::max();

using VisionTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline VisionBatch check_vision_batch(const Tensor& grid_thw, const Tensor& angles, int64_t cells, int64_t windows,
                                      int64_t frames, int64_t merge_size, int64_t window) {
  check(grid_thw.dim() == 2 && grid_thw.size(1) == 3 && grid_thw.scalar_type() == ScalarType::Int &&
            grid_thw.is_contiguous(),
        "vision_positions: grid_thw must be contiguous [M, 3] int32, got ", describe(grid_thw));
  check(0 < merge_size && merge_size <= 1024, "vision_positions: merge_size must be in [1, 1024], got ", merge_size);
  check(0 <= window && window <= kMaxPatches, "vision_positions: window must be in [0, 2^31), got ", window);
  check(0 <= cells && cells <= kMaxPatches / (merge_size * merge_size) && 0 <= windows && windows <= cells &&
            0 <= frames && frames <= cells,
        "vision_positions: cells, windows and frames must be counts of fewer than 2^31 patches, got ", cells, ", ",
        windows, ", ", frames);
  check(angles.dim() == 3 && angles.size(0) == 2 && angles.scalar_type() == ScalarType::Float &&
            angles.is_contiguous() && angles.device() == grid_thw.device(),
        "vision_positions: angles must be contiguous [2, positions, head_dim / 4] float32 on grid_thw's device, got ",
        describe(angles));
  return {grid_thw.const_data_ptr<int32_t>(), grid_thw.size(0), static_cast<int32_t>(merge_size),
          static_cast<int32_t>(window)};
}

inline RotaryAngles rotary_angles(const Tensor& angles) {
  const float* cos = angles.const_data_ptr<float>();
  return {cos, cos + angles.size(1) * angles.size(2), angles.size(1), angles.size(2)};
}

inline VisionTensors new_vision_tensors(const Tensor& grid_thw, const Tensor& angles, int64_t cells, int64_t windows,
                                        int64_t frames, int64_t merge_size, int64_t window) {
  const auto integers = [&](std::initializer_list<int64_t> shape) { return torch::stable::new_empty(grid_thw, shape); };
  const int64_t patches = cells * merge_size * merge_size;
  const auto table = [&] { return torch::stable::new_empty(angles, {patches, 2 * angles.size(2)}); };
  return {integers({patches, 2}),
          integers({cells, 3}),
          integers({window ? cells : 0}),
          integers({window ? cells : 0}),
          integers({window ? windows + 1 : 0}),
          integers({frames + 1}),
          table(),
          table()};
}

inline VisionPositions pointers(const VisionTensors& tensors) {
  const auto& [rope_hw, pos_thw, window_order, window_inverse, cu_windows, cu_frames, cos, sin] = tensors;
  return {rope_hw.mutable_data_ptr<int32_t>(),
          pos_thw.mutable_data_ptr<int32_t>(),
          window_order.mutable_data_ptr<int32_t>(),
          window_inverse.mutable_data_ptr<int32_t>(),
          cu_windows.mutable_data_ptr<int32_t>(),
          cu_frames.mutable_data_ptr<int32_t>(),
          cos.mutable_data_ptr<float>(),
          sin.mutable_data_ptr<float>()};
}

}  // namespace rtp_mm
