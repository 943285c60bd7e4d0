// Runs the CUDA kernels on CPU threads under the sanitizers and compares them with the CPU's algorithms.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/patch_embed.h"
#include "cpu/vision_positions.h"
#include "cuda/patch_embed.h"
#include "cuda/vision_positions.h"
#include "random_data.h"

namespace rtp_mm {
namespace {

constexpr int64_t kPositions = 40, kQuarter = 9;

struct Buffers {
  std::vector<int32_t> rope_hw, pos_thw, window_order, window_inverse, cu_windows, cu_frames;
  std::vector<float> cos, sin;
  int64_t rows;

  explicit Buffers(const VisionBatch& batch, const VisionItem& end, int64_t padding)
      : rope_hw(2 * end.first_cell * batch.merge_size * batch.merge_size, -1),
        pos_thw(3 * end.first_cell, -1),
        window_order(batch.window ? end.first_cell : 0, -1),
        window_inverse(batch.window ? end.first_cell : 0, -1),
        cu_windows(batch.window ? end.first_window + 1 : 0, -1),
        cu_frames(end.first_frame + 1, -1),
        rows(end.first_cell * batch.merge_size * batch.merge_size + padding) {
    cos.resize(rows * 2 * kQuarter, -1);
    sin.resize(rows * 2 * kQuarter, -1);
  }

  VisionPositions pointers() {
    return {rope_hw.data(),
            pos_thw.data(),
            window_order.data(),
            window_inverse.data(),
            cu_windows.data(),
            cu_frames.data(),
            cos.data(),
            sin.data(),
            rows};
  }

  bool operator==(const Buffers&) const = default;
};

void test_vision_positions(const std::vector<int32_t>& grid_thw, int32_t window, int64_t padding) {
  const VisionBatch batch{grid_thw.data(), static_cast<int64_t>(grid_thw.size() / 3), 2, window};
  const std::vector<float> table = random_floats<float>(2 * kPositions * kQuarter);
  const RotaryAngles angles{table.data(), table.data() + kPositions * kQuarter, kPositions, kQuarter};
  const VisionItem end = batch_end(batch);
  Buffers cpu(batch, end, padding), cuda(batch, end, padding);
  vision_positions(batch, angles, cpu.pointers());
  CHECK(launch_vision_positions(batch, end.first_cell, angles, cuda.pointers(), nullptr) == cudaSuccess);
  CHECK(cuda == cpu);
}

template <class Weight, class Out>
void test_patch_embed(int64_t n, int64_t k, int64_t d, int64_t terms, int64_t group) {
  const std::vector<uint8_t> rows = random_bytes(n * k);
  const std::vector<Weight> weight = random_floats<Weight>(terms * d * k);
  std::vector<float> wide;
  for (Weight value : weight) wide.push_back(to_float(value));
  const std::vector<float> bias = random_floats<float>(d);
  std::vector<int32_t> order;
  for (int64_t g = 0; g < n / group; ++g) order.push_back(static_cast<int32_t>(n / group - 1 - g));

  std::vector<float> panels(panel_count(d) * k * kPanelWidth), cpu(n * d);
  for (int64_t panel = 0; panel < panel_count(d); ++panel) {
    pack_panel(wide.data(), terms, d, k, panel, panels.data() + panel * k * kPanelWidth);
  }
  const PatchEmbed job{rows.data(), panels.data(), bias.data(), order.data(), 0.25f, n, k, d, group, best_isa()};
  patch_embed_tiles(job, 0, tile_count(job), cpu.data());

  CudaPatchEmbed<Weight> cuda_job{rows.data(), weight.data(), bias.data(), order.data(), 0.25f, n, k, d, group, terms};
  std::vector<Out> cuda(n * d), last(d);
  CHECK(launch_patch_embed(cuda_job, cuda.data(), nullptr) == cudaSuccess);
  for (int64_t i = 0; i < n * d; ++i) {
    // float32 sums of k products of at most 128 * 5, then one rounding to at least bfloat16's 8 bits
    const float tolerance = 1e-6f * 128 * static_cast<float>(k) + std::abs(cpu[i]) / 256;
    CHECK(std::abs(to_float(cuda[i]) - cpu[i]) <= tolerance);
  }

  // The last row alone has the same bits.
  cuda_job.rows = rows.data() + (order.back() * group + group - 1) * k;
  cuda_job.order = nullptr;
  cuda_job.n = cuda_job.group = 1;
  CHECK(launch_patch_embed(cuda_job, last.data(), nullptr) == cudaSuccess);
  CHECK(std::memcmp(last.data(), cuda.data() + (n - 1) * d, d * sizeof(Out)) == 0);
}

}  // namespace
}  // namespace rtp_mm

int main() {
  using namespace rtp_mm;
  for (const int32_t window : {0, 3, 4}) {
    test_vision_positions({1, 2, 2, 2, 18, 10, 1, 8, 16, 3, 2, 40}, window, 13);
    test_vision_positions({}, window, window);
  }
  test_patch_embed<float, float>(1, 1, 1, 1, 1);
  test_patch_embed<__nv_bfloat16, __half>(66, 33, 65, 2, 3);
  test_patch_embed<__half, __nv_bfloat16>(64, 16, 64, 2, 1);
  test_patch_embed<float, __nv_bfloat16>(5, 47, 130, 1, 5);
}
