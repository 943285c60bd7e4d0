// The door of resize_patchify, one for all devices: checks the arguments.

#pragma once

#include <string>

#include "common.h"
#include "resize_names.h"

namespace rtp_mm {

struct FramesToPatches {
  int64_t count, in_height, in_width;
  int64_t frame_stride, row_stride, pixel_stride;  // bytes
  int64_t height, width, patch, merge, temporal;
  ResizeFilter filter;
  bool is_vertical_first;

  int64_t rows_per_frame() const { return height / patch * (width / patch); }
  int64_t rows() const { return count / temporal * rows_per_frame(); }
  int64_t columns() const { return 3 * temporal * patch * patch; }
};

inline FramesToPatches check_resize_patchify(const Tensor& frames, int64_t height, int64_t width, int64_t patch,
                                             int64_t merge, const std::string& order, const std::string& filter,
                                             int64_t temporal) {
  check(frames.dim() == 4 && frames.size(3) == 3 && frames.scalar_type() == ScalarType::Byte && frames.numel() > 0,
        "resize_patchify: frames must be [F, H, W, 3] uint8 and not empty, got ", describe(frames));
  FramesToPatches job{frames.size(0),
                      frames.size(1),
                      frames.size(2),
                      frames.stride(0),
                      frames.stride(1),
                      frames.stride(2),
                      height,
                      width,
                      patch,
                      merge,
                      temporal,
                      lookup(kFilters, "filter", filter),
                      lookup(kIsVerticalFirst, "order", order)};
  // The stride of a single element says nothing.
  if (job.in_width == 1) job.pixel_stride = 3;
  const int64_t row_bytes = (job.in_width - 1) * job.pixel_stride + 3;
  if (job.in_height == 1) job.row_stride = row_bytes;
  check(frames.stride(3) == 1 && (job.pixel_stride == 3 || job.pixel_stride == 4) && job.row_stride >= row_bytes,
        "resize_patchify: frames must have strides (any, >= row, 3 or 4, 1), got ", describe(frames));
  check(patch > 0 && merge > 0, "resize_patchify: patch_size and merge_size must be positive, got ", patch, " and ",
        merge);
  check(height > 0 && width > 0 && height % patch == 0 && width % patch == 0 && height / patch % merge == 0 &&
            width / patch % merge == 0,
        "resize_patchify: height and width must be multiples of patch_size * merge_size = ", patch, " * ", merge,
        ", got ", height, " and ", width);
  check(temporal > 0 && job.count % temporal == 0, "resize_patchify: temporal_patch_size ", temporal,
        " must divide the frames, got ", describe(frames));
  return job;
}

}  // namespace rtp_mm
