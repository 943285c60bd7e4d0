#include "cpu/vision_positions.h"

namespace rtp_mm {

VisionItem batch_end(const VisionBatch& batch) {
  VisionItem item = first_item(batch);
  while (item.index < batch.items) item = item_after(batch, item);
  return item;
}

void vision_positions(const VisionBatch& batch, const VisionPositions& out) {
  VisionItem item = first_item(batch);
  for (; item.index < batch.items; item = item_after(batch, item)) {
    for (int64_t local = 0; local < item.cells(); ++local) place_cell(batch, item, local, out);
  }
  place_ends(batch, item, out);
}

}  // namespace rtp_mm
