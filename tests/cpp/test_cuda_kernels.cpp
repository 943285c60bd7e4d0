// Runs the CUDA kernels on CPU threads under the sanitizers and compares them with the CPU's algorithms.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/packed_linear.h"
#include "cpu/resize.h"
#include "cpu/vision_positions.h"
#include "cuda/patch_embed.h"
#include "cuda/resize_patchify.h"
#include "cuda/vision_positions.h"
#include "random_data.h"

namespace rtp_mm {
namespace {

constexpr int64_t kPositions = 40, kQuarter = 9;

struct Buffers {
  std::vector<int32_t> rope_hw, pos_thw, window_order, window_inverse, cu_windows, cu_frames;
  std::vector<float> cos, sin;

  Buffers(const VisionBatch& batch, const VisionItem& end)
      : rope_hw(2 * end.first_cell * batch.merge_size * batch.merge_size, -1),
        pos_thw(3 * end.first_cell, -1),
        window_order(batch.window ? end.first_cell : 0, -1),
        window_inverse(batch.window ? end.first_cell : 0, -1),
        cu_windows(batch.window ? end.first_window + 1 : 0, -1),
        cu_frames(end.first_frame + 1, -1),
        cos(end.first_cell * batch.merge_size * batch.merge_size * 2 * kQuarter, -1),
        sin(cos) {}

  VisionPositions pointers() {
    return {rope_hw.data(),    pos_thw.data(),   window_order.data(), window_inverse.data(),
            cu_windows.data(), cu_frames.data(), cos.data(),          sin.data()};
  }

  bool operator==(const Buffers&) const = default;
};

void test_vision_positions(const std::vector<int32_t>& grid_thw, int32_t window) {
  const VisionBatch batch{grid_thw.data(), static_cast<int64_t>(grid_thw.size() / 3), 2, window};
  const std::vector<float> table = random_floats<float>(2 * kPositions * kQuarter);
  const RotaryAngles angles{table.data(), table.data() + kPositions * kQuarter, kPositions, kQuarter};
  const VisionItem end = batch_end(batch);
  Buffers cpu(batch, end), cuda(batch, end);
  vision_positions(batch, angles, cpu.pointers());
  CHECK(launch_vision_positions(batch, end.first_cell, angles, cuda.pointers(), nullptr) == cudaSuccess);
  CHECK(cuda == cpu);
}

struct Shape {
  int64_t n, k, d, terms, group;
  int64_t column_stride;  // of the weight, at least k
  bool has_pos;
};

template <class Weight, class Out>
void test_patch_embed(const Shape& shape) {
  const auto& [n, k, d, terms, group, column_stride, has_pos] = shape;
  const std::vector<uint8_t> rows = random_bytes(n * k);
  // Not one element more than the last column has: what is read past it is seen.
  const std::vector<Weight> weight = random_floats<Weight>((terms * d - 1) * column_stride + k);
  const std::vector<float> bias = random_floats<float>(d), pos = random_floats<float>(n * d);
  std::vector<int32_t> order;
  for (int64_t g = 0; g < n / group; ++g) order.push_back(static_cast<int32_t>(n / group - 1 - g));

  // The CPU's way of the same: terms summed and scaled beforehand, a pointer for every row, the product added to pos.
  std::vector<float> sums;
  for (int64_t i = 0; i < d * k; ++i) {
    float sum = 0;
    for (int64_t term = 0; term < terms; ++term) {
      sum += to_float(weight[(term * d + i / k) * column_stride + i % k]);
    }
    sums.push_back(0.25f * sum);
  }
  const PanelLayout layout{d, 1};
  std::vector<float> panels(layout.panels() * k * layout.panel()), cpu(n * d);
  for (int64_t panel = 0; panel < layout.panels(); ++panel) {
    pack_linear_panel(sums.data(), layout, k, panel, panels.data() + panel * k * layout.panel());
  }
  std::vector<const uint8_t*> inputs;
  for (int64_t i = 0; i < n; ++i) inputs.push_back(rows.data() + (order[i / group] * group + i % group) * k);
  if (has_pos) cpu = pos;
  std::atomic<int64_t> next_tile = 0;
  PackedLinear<float, ByteRows>{.x = inputs.data(),
                                .panels = panels.data(),
                                .scales = nullptr,
                                .sums = nullptr,
                                .bias = bias.data(),
                                .out = cpu.data(),
                                .block_width = d,
                                .m = n,
                                .k = k,
                                .layout = layout,
                                .activation = Activation::kNone,
                                .is_added = has_pos,
                                .isa = best_isa()}
      .run(next_tile);

  CudaPatchEmbed<Weight> cuda_job{
      rows.data(), weight.data(),     bias.data(),  has_pos ? pos.data() : nullptr, order.data(), 0.25f, n, k, d, group,
      terms,       d * column_stride, column_stride};
  std::vector<Out> cuda(n * d), last(d);
  CHECK(launch_patch_embed(cuda_job, cuda.data(), nullptr) == cudaSuccess);
  for (int64_t i = 0; i < n * d; ++i) {
    // float32 sums of k products of at most 128 * 5, then one rounding to at least bfloat16's 8 bits
    const float tolerance = 1e-6f * 128 * static_cast<float>(k) + std::abs(cpu[i]) / 256;
    CHECK(std::abs(to_float(cuda[i]) - cpu[i]) <= tolerance);
  }

  // The last row alone has the same bits.
  const std::vector<uint8_t> row(rows.begin() + (order.back() * group + group - 1) * k,
                                 rows.begin() + (order.back() * group + group) * k);
  cuda_job.rows = row.data();
  if (has_pos) cuda_job.pos += (n - 1) * d;
  cuda_job.order = nullptr;
  cuda_job.n = cuda_job.group = 1;
  CHECK(launch_patch_embed(cuda_job, last.data(), nullptr) == cudaSuccess);
  CHECK(std::memcmp(last.data(), cuda.data() + (n - 1) * d, d * sizeof(Out)) == 0);
}

struct Resize {
  int32_t height, width, out_height, out_width, patch, merge, temporal;
  int64_t pixel_stride;
  bool is_vertical_first;
  ResizeFilter filter;
};

void test_resize_patchify(const Resize& r, int64_t clips) {
  const int64_t row_stride = r.width * r.pixel_stride + 5, count = clips * r.temporal;
  const int64_t frame_stride = r.height * row_stride;
  // Not one byte more than the last pixel has: what is read past it is seen.
  const int64_t size = count * frame_stride - 5 - (r.pixel_stride - 3);
  const std::vector<uint8_t> frames = random_bytes(size);
  const int64_t frame_bytes = r.out_height * r.out_width * 3 * r.temporal;
  std::vector<uint8_t> cpu(clips * frame_bytes), cuda(clips * frame_bytes);
  for (int64_t frame = 0; frame < count; ++frame) {
    const PixelView view{frames.data() + frame * frame_stride, r.height, r.width, row_stride, r.pixel_stride};
    const ResizePatchify job{r.out_height, r.out_width,         r.patch,
                             r.merge,      r.temporal,          frame % r.temporal,
                             r.filter,     r.is_vertical_first, best_resize_level()};
    resize_patchify(view, job, cpu.data() + frame / r.temporal * frame_bytes);
  }
  const auto table = resize_table(r.height, r.width, r.out_height, r.out_width, r.filter);
  CudaResizePatchify job{};
  job.frames = frames.data();
  job.frame_stride = frame_stride, job.row_stride = row_stride, job.pixel_stride = r.pixel_stride;
  job.count = static_cast<int32_t>(count);
  job.height = r.out_height, job.width = r.out_width;
  job.patch = r.patch, job.merge = r.merge, job.temporal = r.temporal;
  job.is_vertical_first = r.is_vertical_first;
  job.table = table->data();
  CHECK(launch_resize_patchify(job, cuda.data(), nullptr) == cudaSuccess);
  CHECK(cuda == cpu);
}

}  // namespace
}  // namespace rtp_mm

int main() {
  using namespace rtp_mm;
  for (const int32_t window : {0, 3, 4}) {
    test_vision_positions({1, 2, 2, 2, 18, 10, 1, 8, 16, 3, 2, 40}, window);
    test_vision_positions({}, window);
  }
  for (const bool is_vertical_first : {false, true}) {
    using enum ResizeFilter;
    test_resize_patchify({70, 90, 56, 84, 14, 2, 1, 3, is_vertical_first, kBicubic}, 2);
    test_resize_patchify({5, 7, 32, 64, 16, 1, 2, 4, is_vertical_first, kLanczos}, 2);
    test_resize_patchify({300, 40, 28, 28, 14, 2, 1, 3, is_vertical_first, kBicubic}, 2);  // several bands
    test_resize_patchify({33, 400, 21, 21, 7, 3, 2, 4, is_vertical_first, kBilinear}, 2);  // patches of odd area
    test_resize_patchify({64, 32, 64, 32, 32, 1, 1, 3, is_vertical_first, kNearest}, 2);   // no pass
    test_resize_patchify({1, 1, 20, 40, 5, 4, 1, 3, is_vertical_first, kBox}, 2);
    test_resize_patchify({9, 8, 3, 70, 1, 1, 1, 4, is_vertical_first, kHamming}, 2);
    // Enough for tiles of several patches.
    test_resize_patchify({70, 90, 56, 84, 14, 2, 1, 3, is_vertical_first, kBicubic}, 32);
  }
  // Without tensor cores.
  test_patch_embed<float, float>({1, 1, 1, 1, 1, 1, false});
  test_patch_embed<__nv_bfloat16, __half>({66, 33, 65, 2, 3, 33, false});
  test_patch_embed<__half, __nv_bfloat16>({64, 17, 64, 2, 1, 17, true});
  test_patch_embed<float, __nv_bfloat16>({5, 47, 130, 1, 5, 47, false});
  // With: tails of rows, columns and k, copies and stores wide and narrow.
  test_patch_embed<__nv_bfloat16, float>({129, 44, 68, 2, 3, 48, true});
  test_patch_embed<__half, __half>({3, 80, 62, 2, 1, 82, false});
  test_patch_embed<__nv_bfloat16, __nv_bfloat16>({4, 4, 8, 1, 2, 4, true});
  test_patch_embed<__half, float>({1, 112, 4, 2, 1, 112, false});
  test_patch_embed<__half, __nv_bfloat16>({9, 40, 72, 1, 3, 40, true});
  test_patch_embed<__nv_bfloat16, __half>({2, 588, 8, 1, 1, 592, false});  // a still image's
}
