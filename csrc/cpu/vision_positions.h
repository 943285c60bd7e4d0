#pragma once

#include "vision_grid.h"

namespace rtp_mm {

// The empty item after the last one: its first_cell, first_frame and first_window are the batch's totals.
VisionItem batch_end(const VisionBatch& batch);

// Rotary ids and angles, output ids, window order and segment borders of a whole batch (schema: ops.cpp, shapes:
// VisionPositions). The angles must hold every row and column.
void vision_positions(const VisionBatch& batch, const RotaryAngles& angles, const VisionPositions& out);

}  // namespace rtp_mm
