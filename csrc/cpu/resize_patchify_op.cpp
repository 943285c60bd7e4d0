#include "cpu/resize.h"
#include "resize_patchify_door.h"

namespace rtp_mm {
namespace {

Tensor resize_patchify_cpu(const Tensor& frames, int64_t height, int64_t width, int64_t patch, int64_t merge,
                           std::string order, std::string filter, int64_t temporal) {
  const FramesToPatches job = check_resize_patchify(frames, height, width, patch, merge, order, filter, temporal);
  Tensor out = torch::stable::new_empty(frames, {job.rows(), job.columns()});
  const uint8_t* pixels = frames.const_data_ptr<uint8_t>();
  uint8_t* rows = out.mutable_data_ptr<uint8_t>();
  const ResizeLevel level = best_resize_level();
  torch::stable::parallel_for(0, job.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t frame = begin; frame < end; ++frame) {
      const PixelView view{pixels + frame * job.frame_stride, job.in_height, job.in_width, job.row_stride,
                           job.pixel_stride};
      const ResizePatchify resize{
          height, width, patch, merge, temporal, frame % temporal, job.filter, job.is_vertical_first, level};
      resize_patchify(view, resize, rows + frame / temporal * job.rows_per_frame() * job.columns());
    }
  });
  return out;
}

}  // namespace
}  // namespace rtp_mm

STABLE_TORCH_LIBRARY_IMPL(rtp_mm, CPU, m) { m.impl("resize_patchify", TORCH_BOX(&rtp_mm::resize_patchify_cpu)); }
