// Where the cells of a batch of grids lie: integer arithmetic that the CPU loop and the CUDA kernel share.
// A cell is one merged token: merge_size x merge_size patches.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RTP_MM_HOST_DEVICE __host__ __device__
#else
#define RTP_MM_HOST_DEVICE
#endif

namespace rtp_mm {

struct VisionBatch {
  const int32_t* grid_thw;  // [items, 3] in patches, h and w divisible by merge_size
  int64_t items;
  int32_t merge_size;
  int32_t window;  // side in cells; 0: no windows
};

struct VisionPositions {
  int32_t* rope_hw;       // [cells * merge_size^2, 2]
  int32_t* pos_thw;       // [cells, 3]
  int32_t* window_order;  // [cells], or null without windows
  int32_t* cu_windows;    // [windows + 1], or null without windows
  int32_t* cu_frames;     // [frames + 1]
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

// Writes all that follows from one cell of an item, `local` in [0, item.cells()); no two cells write the same place.
RTP_MM_HOST_DEVICE inline void place_cell(const VisionBatch& batch, const VisionItem& item, int64_t local,
                                          const VisionPositions& out) {
  const int64_t m = batch.merge_size;
  const int64_t frame = local / item.cells_per_frame();
  const int64_t in_frame = local % item.cells_per_frame();
  const int64_t row = in_frame / item.columns;
  const int64_t column = in_frame % item.columns;
  const int64_t cell = item.first_cell + local;
  const int64_t frame_cell = cell - in_frame;

  int32_t* thw = out.pos_thw + 3 * cell;
  thw[0] = static_cast<int32_t>(frame);
  thw[1] = static_cast<int32_t>(row);
  thw[2] = static_cast<int32_t>(column);

  int32_t* hw = out.rope_hw + 2 * m * m * cell;
  for (int64_t y = 0; y < m; ++y) {
    for (int64_t x = 0; x < m; ++x, hw += 2) {
      hw[0] = static_cast<int32_t>(row * m + y);
      hw[1] = static_cast<int32_t>(column * m + x);
    }
  }

  if (in_frame == 0) out.cu_frames[item.first_frame + frame] = static_cast<int32_t>(frame_cell * m * m);

  if (batch.window == 0) return;
  const int64_t side = batch.window;
  const int64_t top = row - row % side;
  const int64_t left = column - column % side;
  const int64_t height = smaller(side, item.rows - top);
  const int64_t width = smaller(side, item.columns - left);
  // Before this window lie the window rows above, in full width, and the windows to its left, `height` high.
  const int64_t window_cell = frame_cell + top * item.columns + height * left;
  out.window_order[window_cell + (row - top) * width + (column - left)] = static_cast<int32_t>(cell);
  if (row == top && column == left) {
    const int64_t windows_across = ceil_div(item.columns, side);
    const int64_t windows_per_frame = ceil_div(item.rows, side) * windows_across;
    const int64_t window = frame * windows_per_frame + top / side * windows_across + left / side;
    out.cu_windows[item.first_window + window] = static_cast<int32_t>(window_cell * m * m);
  }
}

// The ends of the cumulative counts; `end` is the empty item after the last.
RTP_MM_HOST_DEVICE inline void place_ends(const VisionBatch& batch, const VisionItem& end, const VisionPositions& out) {
  const int32_t patches = static_cast<int32_t>(end.first_cell * batch.merge_size * batch.merge_size);
  out.cu_frames[end.first_frame] = patches;
  if (batch.window) out.cu_windows[end.first_window] = patches;
}

}  // namespace rtp_mm
