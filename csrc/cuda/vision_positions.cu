#include "cuda/vision_positions.h"

namespace rtp_mm {
namespace {

constexpr int kWarp = 32;
constexpr int kCellsPerBlock = 4;

// The angles of a cell's patches, in the tower's row order: neighbours in a warp write neighbours in memory.
__device__ void turn_cell(int merge, const VisionCell& cell, const RotaryAngles& angles, const VisionPositions& out,
                          int lane) {
  const int quarter = static_cast<int>(angles.quarter), width = 2 * quarter;
  const int64_t first_row = cell.row * merge, first_column = cell.column * merge;
  if (first_row + merge > angles.positions || first_column + merge > angles.positions) __trap();
  const int64_t to = cell.place * merge * merge * width;
  for (int i = lane; i < merge * merge * width; i += kWarp) {
    const int patch = i / width, pair = i % width;
    const int64_t position = pair < quarter ? first_row + patch / merge : first_column + patch % merge;
    const int64_t from = position * quarter + (pair < quarter ? pair : pair - quarter);
    out.cos[to + i] = angles.cos[from];
    out.sin[to + i] = angles.sin[from];
  }
}

__global__ void __launch_bounds__(kWarp* kCellsPerBlock)
    place_cells(VisionBatch batch, int64_t cells, RotaryAngles angles, VisionPositions out) {
  const int lane = threadIdx.x;
  const int64_t warp = int64_t{blockIdx.x} * kCellsPerBlock + threadIdx.y;
  if (warp > cells) return;
  // Each warp walks the grids up to its own: a batch holds tens of items, whose grids stay in L1.
  VisionItem item = first_item(batch);
  while (item.index < batch.items && item.first_cell + item.cells() <= warp) item = item_after(batch, item);
  if (item.index < batch.items) {
    const VisionCell cell = cell_of(batch, item, warp - item.first_cell);
    if (lane == 0) place_cell(batch, item, cell, out);
    turn_cell(batch.merge_size, cell, angles, out, lane);
  } else if (lane == 0) {
    place_ends(batch, item, out);  // the one warp after the last cell
  }
}

}  // namespace

cudaError_t launch_vision_positions(const VisionBatch& batch, int64_t cells, const RotaryAngles& angles,
                                    const VisionPositions& out, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(cells + 1, kCellsPerBlock));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kWarp, kCellsPerBlock);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, place_cells, batch, cells, angles, out);
}

}  // namespace rtp_mm
