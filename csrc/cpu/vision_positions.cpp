#include "cpu/vision_positions.h"

#include <algorithm>

namespace rtp_mm {
namespace {

// The angles of a cell's patches, in the tower's row order.
void turn_cell(int64_t merge, const VisionCell& cell, const RotaryAngles& angles, const VisionPositions& out) {
  const int64_t quarter = angles.quarter;
  int64_t to = cell.place * merge * merge * 2 * quarter;
  for (int64_t y = 0; y < merge; ++y) {
    const int64_t row = (cell.row * merge + y) * quarter;
    for (int64_t x = 0; x < merge; ++x, to += 2 * quarter) {
      const int64_t column = (cell.column * merge + x) * quarter;
      std::copy_n(angles.cos + row, quarter, out.cos + to);
      std::copy_n(angles.sin + row, quarter, out.sin + to);
      std::copy_n(angles.cos + column, quarter, out.cos + to + quarter);
      std::copy_n(angles.sin + column, quarter, out.sin + to + quarter);
    }
  }
}

}  // namespace

VisionItem batch_end(const VisionBatch& batch) {
  VisionItem item = first_item(batch);
  while (item.index < batch.items) item = item_after(batch, item);
  return item;
}

void vision_positions(const VisionBatch& batch, const RotaryAngles& angles, const VisionPositions& out) {
  VisionItem item = first_item(batch);
  for (; item.index < batch.items; item = item_after(batch, item)) {
    for (int64_t local = 0; local < item.cells(); ++local) {
      const VisionCell cell = cell_of(batch, item, local);
      place_cell(batch, item, cell, out);
      turn_cell(batch.merge_size, cell, angles, out);
    }
  }
  place_ends(batch, item, out);
}

}  // namespace rtp_mm
