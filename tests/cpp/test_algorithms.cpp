// Runs every algorithm file under AddressSanitizer and UndefinedBehaviorSanitizer: buffers are heap blocks of exactly
// the stated size, sizes are odd ones, answers are compared with naive loops.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/patch_embed.h"
#include "cpu/patchify.h"
#include "cpu/vision_positions.h"
#include "random_data.h"

namespace rtp_mm {
namespace {

void test_vision_positions(const std::vector<int32_t>& grid_thw, int32_t merge_size, int32_t window) {
  const VisionBatch batch{grid_thw.data(), static_cast<int64_t>(grid_thw.size() / 3), merge_size, window};
  const VisionItem end = batch_end(batch);
  const int64_t cells = end.first_cell, patches = cells * merge_size * merge_size;
  // -1 where nothing is written: every place must be.
  std::vector<int32_t> rope_hw(2 * patches, -1), pos_thw(3 * cells, -1), cu_frames(end.first_frame + 1, -1);
  std::vector<int32_t> window_order(window ? cells : 0, -1), cu_windows(window ? end.first_window + 1 : 0, -1);
  vision_positions(batch, {rope_hw.data(), pos_thw.data(), window_order.data(), cu_windows.data(), cu_frames.data()});
  for (const auto* values : {&rope_hw, &pos_thw, &window_order, &cu_windows, &cu_frames}) {
    for (int32_t value : *values) CHECK(value >= 0);
  }
  for (const auto* borders : {&cu_frames, &cu_windows}) {
    for (size_t i = 1; i < borders->size(); ++i) CHECK((*borders)[i - 1] < (*borders)[i]);
    if (!borders->empty()) CHECK(borders->front() == 0 && borders->back() == patches);
  }
  std::vector<bool> is_taken(cells);
  for (int32_t cell : window_order) {
    CHECK(cell < cells && !is_taken[cell]);
    is_taken[cell] = true;
  }
}

template <class Weight, class Out>
void test_patch_embed(Isa isa, int64_t n, int64_t k, int64_t d, int64_t terms, int64_t group) {
  const std::vector<uint8_t> rows = random_bytes(n * k);
  const std::vector<Weight> weight = random_floats<Weight>(terms * d * k);
  const std::vector<float> bias = random_floats<float>(d);
  std::vector<int32_t> order;
  for (int64_t g = 0; g < n / group; ++g) order.push_back(static_cast<int32_t>(n / group - 1 - g));
  std::vector<float> panels(panel_count(d) * k * kPanelWidth);
  for (int64_t panel = 0; panel < panel_count(d); ++panel) {
    pack_panel(weight.data(), terms, d, k, panel, panels.data() + panel * k * kPanelWidth);
  }
  const PatchEmbed job{rows.data(), panels.data(), bias.data(), order.data(), 0.25f, n, k, d, group, isa};
  std::vector<Out> out(n * d);
  const int64_t middle = tile_count(job) / 2;
  patch_embed_tiles(job, middle, tile_count(job), out.data());
  patch_embed_tiles(job, 0, middle, out.data());

  // The last row alone has the same bits.
  PatchEmbed alone = job;
  alone.rows = rows.data() + (order.back() * group + group - 1) * k;
  alone.order = nullptr;
  alone.n = alone.group = 1;
  std::vector<Out> last(d);
  patch_embed_tiles(alone, 0, tile_count(alone), last.data());
  CHECK(std::memcmp(last.data(), out.data() + (n - 1) * d, d * sizeof(Out)) == 0);

  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = order[i / group] * group + i % group;
    for (int64_t j = 0; j < d; ++j) {
      double sum = 0, magnitude = 1;
      for (int64_t l = 0; l < k; ++l) {
        double w = 0;
        for (int64_t term = 0; term < terms; ++term) w += to_float(weight[(term * d + j) * k + l]);
        sum += (rows[row * k + l] - 128) * w;
        magnitude += std::abs((rows[row * k + l] - 128) * w);
      }
      // float32 sums, then one rounding to at least bfloat16's 8 bits
      const double exact = 0.25 * sum + bias[j], tolerance = 1e-6 * magnitude + std::abs(exact) / 256;
      CHECK(std::abs(to_float(out[i * d + j]) - exact) <= tolerance);
    }
  }
}

void test_patchify(int64_t frames, int64_t height, int64_t width, int64_t patch, int64_t merge, int64_t temporal) {
  const std::vector<uint8_t> pixels = random_bytes(frames * height * width * 3);
  std::vector<uint8_t> rows(pixels.size());
  patchify({pixels.data(), frames, height, width, patch, merge, temporal}, rows.data());
  // Every byte goes to one place: the place of pixel (f, y, x, c).
  const int64_t block = patch * merge, row_bytes = 3 * temporal * patch * patch;
  for (int64_t f = 0; f < frames; ++f) {
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t x = 0; x < width; ++x) {
        const int64_t blocks = (f / temporal * (height / block) + y / block) * (width / block) + x / block;
        const int64_t row = (blocks * merge + y % block / patch) * merge + x % block / patch;
        for (int64_t c = 0; c < 3; ++c) {
          const int64_t column = ((c * temporal + f % temporal) * patch + y % patch) * patch + x % patch;
          CHECK(rows[row * row_bytes + column] == pixels[((f * height + y) * width + x) * 3 + c]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace rtp_mm

int main() {
  using namespace rtp_mm;
  for (const int32_t window : {0, 1, 3, 4, 100}) {
    test_vision_positions({1, 2, 2, 2, 18, 10, 1, 8, 16, 3, 2, 40}, 2, window);
    test_vision_positions({2, 5, 7}, 1, window);
    test_vision_positions({}, 2, window);
  }
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (isa > best_isa()) break;
    test_patch_embed<float, float>(isa, 1, 1, 1, 1, 1);
    test_patch_embed<float, BFloat16>(isa, 66, 129, 33, 2, 2);
    test_patch_embed<BFloat16, Float16>(isa, 7, 130, 32, 2, 7);
    test_patch_embed<Float16, float>(isa, 130, 5, 65, 1, 1);
  }
  test_patchify(1, 28, 56, 14, 2, 1);
  test_patchify(4, 10, 15, 5, 1, 2);
  test_patchify(2, 16, 16, 16, 1, 1);
}
