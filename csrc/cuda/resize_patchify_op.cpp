#include <limits>

#include "cuda/launch.h"
#include "cuda/resize_patchify.h"
#include "resize_patchify_door.h"

namespace rtp_mm {
namespace {

Tensor resize_patchify_cuda(const Tensor& frames, int64_t height, int64_t width, int64_t patch, int64_t merge,
                            std::string order, std::string filter, int64_t temporal) {
  const FramesToPatches job = check_resize_patchify(frames, height, width, patch, merge, order, filter, temporal);
  check(patch <= kLargestCudaPatch, "resize_patchify: patch_size must be at most ", kLargestCudaPatch, " on CUDA, got ",
        patch);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(job.in_height <= kMost && job.in_width <= kMost && height <= kMost / width / job.count,
        "resize_patchify: frames must have fewer than 2^31 pixels in all on CUDA, got ", job.count, " of ", height,
        " x ", width, " from ", describe(frames));
  const CudaScope cuda(frames);
  const auto table = resize_table(job.in_height, job.in_width, height, width, job.filter);
  const int64_t entries = static_cast<int64_t>(table->size());
  const Tensor device_table = torch::stable::new_empty(frames, {entries}, ScalarType::Int);
  // From pageable memory: copied aside before the call returns, so the cache may drop it.
  check_launch("resize_patchify", cudaMemcpyAsync(device_table.mutable_data_ptr(), table->data(),
                                                  entries * sizeof(int32_t), cudaMemcpyHostToDevice, cuda.stream()));
  Tensor out = torch::stable::new_empty(frames, {job.rows(), job.columns()});
  CudaResizePatchify resize{};
  resize.frames = frames.const_data_ptr<uint8_t>();
  resize.frame_stride = job.frame_stride, resize.row_stride = job.row_stride, resize.pixel_stride = job.pixel_stride;
  resize.count = static_cast<int32_t>(job.count);
  resize.height = static_cast<int32_t>(height), resize.width = static_cast<int32_t>(width);
  resize.patch = static_cast<int32_t>(patch), resize.merge = static_cast<int32_t>(merge);
  resize.temporal = static_cast<int32_t>(temporal);
  resize.is_vertical_first = job.is_vertical_first;
  resize.table = device_table.const_data_ptr<int32_t>();
  check_launch("resize_patchify", launch_resize_patchify(resize, out.mutable_data_ptr<uint8_t>(), cuda.stream()));
  return out;
}

}  // namespace
}  // namespace rtp_mm

STABLE_TORCH_LIBRARY_IMPL(rtp_mm, CUDA, m) { m.impl("resize_patchify", TORCH_BOX(&rtp_mm::resize_patchify_cuda)); }
