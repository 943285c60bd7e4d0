#include "cuda/vision_positions.h"

namespace rtp_mm {
namespace {

constexpr int kThreads = 128;

__global__ void place_cells(VisionBatch batch, int64_t cells, VisionPositions out) {
  const int64_t cell = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (cell > cells) return;
  // Each thread walks the grids up to its own: a batch holds tens of items, whose grids stay in L1.
  VisionItem item = first_item(batch);
  while (item.index < batch.items && item.first_cell + item.cells() <= cell) item = item_after(batch, item);
  if (item.index < batch.items) {
    place_cell(batch, item, cell - item.first_cell, out);
  } else {
    place_ends(batch, item, out);  // cell == cells, the one thread after the last cell
  }
}

}  // namespace

cudaError_t launch_vision_positions(const VisionBatch& batch, int64_t cells, const VisionPositions& out,
                                    cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(cells + 1, kThreads));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, place_cells, batch, cells, out);
}

}  // namespace rtp_mm
