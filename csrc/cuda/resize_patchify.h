#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/resize_windows.h"

namespace rtp_mm {

constexpr int64_t kLargestCudaPatch = 32;  // pixels: a block holds a whole patch

// The coefficients of both axes in one piece of memory, to be copied to the device: three integers for each column,
// then for each row (first pixel, count, index of the first coefficient), then the coefficients: the first ones of an
// axis side by side, so that neighbouring threads read neighbours, then the second ones and so on.
std::shared_ptr<const std::vector<int32_t>> resize_table(int64_t height, int64_t width, int64_t out_height,
                                                         int64_t out_width, ResizeFilter filter);

struct CudaResizePatchify {
  const uint8_t* frames;                           // pixels of three bytes, any strides
  int64_t frame_stride, row_stride, pixel_stride;  // bytes
  int32_t count;
  int32_t height, width;           // of a resized frame, divisible by patch * merge; less than 2^31 pixels
  int32_t patch, merge, temporal;  // patch at most kLargestCudaPatch; count divisible by temporal
  bool is_vertical_first;
  const int32_t* table;  // the device's copy of resize_table
};

// rows [count / temporal * height / patch * width / patch, 3 * temporal * patch * patch] as cpu/resize.h has them,
// byte for byte. One launch. Pointers are the device's; `rows` is aligned to 4 bytes.
cudaError_t launch_resize_patchify(const CudaResizePatchify& job, uint8_t* rows, cudaStream_t stream);

}  // namespace rtp_mm
