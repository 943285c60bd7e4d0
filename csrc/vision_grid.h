// Where the cells of a batch of grids lie: integer arithmetic that the CPU loop and the CUDA kernel share.
// A cell is one merged token: merge_size x merge_size patches.

#pragma once

#include <cstdint>

#include "merge_order.h"

namespace rtp_mm {

struct VisionBatch {
  const int32_t* grid_thw;  // [items, 3] in patches, h and w divisible by merge_size
  int64_t items;
  int32_t merge_size;
  int32_t window;  // side in cells; 0: no windows
};

// The angles of one coordinate by which `quarter` pairs of a head turn.
struct RotaryAngles {
  const float *cos, *sin;  // [positions, quarter]
  int64_t positions, quarter;
};

struct VisionPositions {
  int32_t* rope_hw;         // [cells * merge_size^2, 2]
  int32_t* pos_thw;         // [cells, 3]
  int32_t* window_order;    // [cells], or null without windows
  int32_t* window_inverse;  // [cells], or null without windows
  int32_t* cu_windows;      // [windows + 1], or null without windows
  int32_t* cu_frames;       // [frames + 1]
  float *cos, *sin;         // [patches, 2 * quarter]: of a patch's row, then of its column; in window order
};

RTP_MM_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
RTP_MM_HOST_DEVICE inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// One image or clip of the batch, and where its parts begin in the whole batch.
struct VisionItem {
  int64_t index, frames, rows, columns;  // rows and columns in cells
  int64_t first_cell, first_frame, first_window;

  RTP_MM_HOST_DEVICE int64_t cells_per_frame() const { return rows * columns; }
  RTP_MM_HOST_DEVICE int64_t cells() const { return frames * cells_per_frame(); }
  RTP_MM_HOST_DEVICE int64_t windows(int64_t side) const {
    return side ? frames * ceil_div(rows, side) * ceil_div(columns, side) : 0;
  }
};

RTP_MM_HOST_DEVICE inline VisionItem item_at(const VisionBatch& batch, int64_t index, int64_t first_cell,
                                             int64_t first_frame, int64_t first_window) {
  VisionItem item{index, 0, 0, 0, first_cell, first_frame, first_window};
  if (index < batch.items) {
    const int32_t* thw = batch.grid_thw + 3 * index;
    item.frames = thw[0];
    item.rows = thw[1] / batch.merge_size;
    item.columns = thw[2] / batch.merge_size;
  }
  return item;
}

RTP_MM_HOST_DEVICE inline VisionItem first_item(const VisionBatch& batch) { return item_at(batch, 0, 0, 0, 0); }

// After the last item comes one that is empty, whose first_* are the totals of the batch.
RTP_MM_HOST_DEVICE inline VisionItem item_after(const VisionBatch& batch, const VisionItem& item) {
  return item_at(batch, item.index + 1, item.first_cell + item.cells(), item.first_frame + item.frames,
                 item.first_window + item.windows(batch.window));
}

// One merged token: where it lies in its frame and its window, and where those begin in the batch. Counts of cells.
struct VisionCell {
  int64_t index;  // in the batch, raster order
  int64_t place;  // in the tower's row order: window by window, else the index
  int64_t frame, row, column;
  int64_t first_of_frame;
  int64_t top, left, first_of_window;  // of its window; without windows 0
};

// Cell `local` of an item, in [0, item.cells()).
RTP_MM_HOST_DEVICE inline VisionCell cell_of(const VisionBatch& batch, const VisionItem& item, int64_t local) {
  VisionCell cell{};
  const int64_t in_frame = local % item.cells_per_frame();
  cell.index = item.first_cell + local;
  cell.place = cell.index;
  cell.frame = local / item.cells_per_frame();
  cell.row = in_frame / item.columns;
  cell.column = in_frame % item.columns;
  cell.first_of_frame = cell.index - in_frame;
  if (const int64_t side = batch.window) {
    cell.top = cell.row - cell.row % side;
    cell.left = cell.column - cell.column % side;
    const int64_t height = smaller(side, item.rows - cell.top);
    const int64_t width = smaller(side, item.columns - cell.left);
    // Before this window lie the window rows above, in full width, and the windows to its left, `height` high.
    cell.first_of_window = cell.first_of_frame + cell.top * item.columns + height * cell.left;
    cell.place = cell.first_of_window + (cell.row - cell.top) * width + (cell.column - cell.left);
  }
  return cell;
}

// Writes all integers that follow from one cell of an item; no two cells write the same place.
RTP_MM_HOST_DEVICE inline void place_cell(const VisionBatch& batch, const VisionItem& item, const VisionCell& cell,
                                          const VisionPositions& out) {
  const int64_t m = batch.merge_size, side = batch.window;
  int32_t* thw = out.pos_thw + 3 * cell.index;
  thw[0] = static_cast<int32_t>(cell.frame);
  thw[1] = static_cast<int32_t>(cell.row);
  thw[2] = static_cast<int32_t>(cell.column);

  int32_t* hw = out.rope_hw + 2 * m * m * cell.index;
  for (int64_t y = 0; y < m; ++y) {
    for (int64_t x = 0; x < m; ++x, hw += 2) {
      hw[0] = static_cast<int32_t>(cell.row * m + y);
      hw[1] = static_cast<int32_t>(cell.column * m + x);
    }
  }

  if (cell.index == cell.first_of_frame) {
    out.cu_frames[item.first_frame + cell.frame] = static_cast<int32_t>(cell.index * m * m);
  }
  if (side == 0) return;
  out.window_order[cell.place] = static_cast<int32_t>(cell.index);
  out.window_inverse[cell.index] = static_cast<int32_t>(cell.place);
  if (cell.place == cell.first_of_window) {
    const int64_t windows_across = ceil_div(item.columns, side);
    const int64_t windows_per_frame = ceil_div(item.rows, side) * windows_across;
    const int64_t window = cell.frame * windows_per_frame + cell.top / side * windows_across + cell.left / side;
    out.cu_windows[item.first_window + window] = static_cast<int32_t>(cell.place * m * m);
  }
}

// The ends of the cumulative counts; `end` is the empty item after the last.
RTP_MM_HOST_DEVICE inline void place_ends(const VisionBatch& batch, const VisionItem& end, const VisionPositions& out) {
  const int32_t patches = static_cast<int32_t>(end.first_cell * batch.merge_size * batch.merge_size);
  out.cu_frames[end.first_frame] = patches;
  if (batch.window) out.cu_windows[end.first_window] = patches;
}

}  // namespace rtp_mm
