// Kernels as threads share them, for ThreadSanitizer: one product's tiles, one attention's tasks, the resize's cache.

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/packed_attention.h"
#include "cpu/packed_linear.h"
#include "cpu/resize.h"
#include "random_data.h"

namespace rtp_mm {
namespace {

constexpr int kThreads = 4;

void on_threads(const std::function<void(int)>& work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
}

void test_tiles_of_one_product() {
  constexpr int64_t m = 500, k = 70, width = 300;
  const PanelLayout layout{width, 1};
  const auto x = random_floats<float>(m * k), bias = random_floats<float>(width);
  const auto panels = random_floats<float>(layout.panels() * k * layout.panel());
  std::vector<float> alone(m * width), together(alone);
  PackedLinear<float> product{.x = x.data(),
                              .panels = panels.data(),
                              .scales = nullptr,
                              .sums = nullptr,
                              .bias = bias.data(),
                              .out = alone.data(),
                              .block_width = width,
                              .m = m,
                              .k = k,
                              .layout = layout,
                              .activation = Activation::kGelu,
                              .is_added = false,
                              .isa = best_isa()};
  std::atomic<int64_t> next_tile = 0;
  product.run(next_tile);
  product.out = together.data();
  next_tile = 0;
  on_threads([&](int) { product.run(next_tile); });
  CHECK(alone == together);
}

void test_tasks_of_one_attention() {
  constexpr int64_t n = 300, heads = 4, dim = 40;
  const std::vector<int32_t> cu_seqlens{0, 7, 150, 300};
  const auto qkv = random_floats<float>(n * 3 * heads * dim), cos = random_floats<float>(n * dim / 2), sin = cos;
  std::vector<float> alone(n * heads * dim), together(alone);
  PackedAttention<float> job{.qkv = qkv.data(),
                             .row_stride = 3 * heads * dim,
                             .part_stride = heads * dim,
                             .head_stride = dim,
                             .cos = cos.data(),
                             .sin = sin.data(),
                             .cu_seqlens = cu_seqlens.data(),
                             .out = alone.data(),
                             .segments = 3,
                             .heads = heads,
                             .dim = dim,
                             .isa = best_isa()};
  job.run(0, job.tasks());
  job.out = together.data();
  on_threads([&](int i) { job.run(job.tasks() * i / kThreads, job.tasks() * (i + 1) / kThreads); });
  CHECK(alone == together);
}

// Each thread asks for windows that the others make at the same time.
void test_images_resized_side_by_side() {
  constexpr int64_t kHeight = 40, kWidth = 50, kBlock = 4;
  const auto pixels = random_bytes(kHeight * kWidth * 3);
  const auto resized = [&](int64_t blocks) {
    const ResizePatchify job{.height = blocks * kBlock,
                             .width = (blocks + 1) * kBlock,
                             .patch = 2,
                             .merge = 2,
                             .temporal = 1,
                             .slot = 0,
                             .filter = ResizeFilter(blocks % 6),
                             .is_vertical_first = false,
                             .level = best_resize_level()};
    std::vector<uint8_t> rows(job.height * job.width * 3);
    resize_patchify({pixels.data(), kHeight, kWidth, kWidth * 3, 3}, job, rows.data());
    return rows;
  };
  constexpr int64_t kSizes = 20;
  std::vector<std::vector<uint8_t>> found[kThreads];
  on_threads([&](int i) {
    for (int64_t blocks = 1; blocks <= kSizes; ++blocks) found[i].push_back(resized(blocks));
  });
  for (int64_t blocks = 1; blocks <= kSizes; ++blocks) {
    for (const auto& rows : found) CHECK(rows[blocks - 1] == resized(blocks));
  }
}

}  // namespace
}  // namespace rtp_mm

int main() {
  rtp_mm::test_tiles_of_one_product();
  rtp_mm::test_tasks_of_one_attention();
  rtp_mm::test_images_resized_side_by_side();
}
