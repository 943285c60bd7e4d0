// Runs every algorithm file under AddressSanitizer and UndefinedBehaviorSanitizer: buffers are heap blocks of exactly
// the stated size, sizes are odd ones, answers are compared with naive loops.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "check_attention.h"
#include "check_int8.h"
#include "check_pointwise.h"
#include "cpu/over_white.h"
#include "cpu/packed_linear.h"
#include "cpu/probe.h"
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
  std::vector<int32_t> window_order(window ? cells : 0, -1), window_inverse(window_order);
  std::vector<int32_t> cu_windows(window ? end.first_window + 1 : 0, -1);
  constexpr int64_t kQuarter = 3;
  const int64_t positions = grid_thw.empty() ? 0 : *std::max_element(grid_thw.begin(), grid_thw.end());
  std::vector<float> table(2 * positions * kQuarter);  // cos: its position; sin: the same, negative
  for (int64_t i = 0; i < positions * kQuarter; ++i) {
    table[i] = static_cast<float>(i / kQuarter);
    table[positions * kQuarter + i] = -table[i];
  }
  std::vector<float> cos(patches * 2 * kQuarter), sin(cos);
  vision_positions(batch, {table.data(), table.data() + positions * kQuarter, positions, kQuarter},
                   {rope_hw.data(), pos_thw.data(), window_order.data(), window_inverse.data(), cu_windows.data(),
                    cu_frames.data(), cos.data(), sin.data()});
  for (const auto* values : {&rope_hw, &pos_thw, &window_order, &window_inverse, &cu_windows, &cu_frames}) {
    for (int32_t value : *values) CHECK(value >= 0);
  }
  const int64_t area = merge_size * merge_size;
  for (int64_t row = 0; row < patches; ++row) {
    const int64_t cell = window ? window_order[row / area] : row / area;
    for (int64_t i = 0; i < 2 * kQuarter; ++i) {
      const size_t at = row * 2 * kQuarter + i;
      const auto position = static_cast<float>(rope_hw[2 * (cell * area + row % area) + i / kQuarter]);
      CHECK(cos[at] == position && sin[at] == -position);
    }
  }
  for (const auto* borders : {&cu_frames, &cu_windows}) {
    for (size_t i = 1; i < borders->size(); ++i) CHECK((*borders)[i - 1] < (*borders)[i]);
    if (!borders->empty()) CHECK(borders->front() == 0 && borders->back() == patches);
  }
  std::vector<bool> is_taken(cells);
  for (int32_t cell : window_order) {
    CHECK(cell < cells && !is_taken[cell]);
    is_taken[cell] = true;
    CHECK(window_order[window_inverse[cell]] == cell);
  }
}

template <class Product>
void run_on(const Product& product, int threads) {
  std::atomic<int64_t> next_tile = 0;
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i) pool.emplace_back([&] { product.run(next_tile); });
  for (std::thread& thread : pool) thread.join();
}

template <class Weight>
void test_packed_linear(Isa isa, Activation activation, bool is_added, int64_t m, int64_t k, int64_t width) {
  const PanelLayout layout{width, activation == Activation::kSiluGate ? 2 : 1};
  const std::vector<float> x = random_floats<float>(m * k), bias = random_floats<float>(layout.parts * width);
  const std::vector<Weight> weight = random_floats<Weight>(layout.parts * width * k);
  std::vector<Weight> panels(layout.panels() * k * layout.panel());
  for (int64_t panel = 0; panel < layout.panels(); ++panel) {
    pack_linear_panel(weight.data(), layout, k, panel, panels.data() + panel * k * layout.panel());
  }
  const std::vector<float> residual = random_floats<float>(m * width);
  std::vector<float> out = residual;
  const PackedLinear<Weight> job{x.data(), panels.data(), nullptr,    nullptr,  bias.data(), out.data(), width, m,
                                 k,        layout,        activation, is_added, isa};
  run_on(job, 3);

  // The last row alone has the same bits.
  std::vector<float> last(residual.end() - width, residual.end());
  PackedLinear<Weight> alone = job;
  alone.x = x.data() + (m - 1) * k, alone.out = last.data(), alone.m = 1;
  run_on(alone, 1);
  CHECK(std::memcmp(last.data(), out.data() + (m - 1) * width, width * sizeof(float)) == 0);

  if (!is_added) {  // Column by column, the same bits.
    std::vector<float> by_column(out.size());
    PackedLinear<Weight> blocks = job;
    blocks.out = by_column.data(), blocks.block_width = blocks.out_stride = 1;
    run_on(blocks, 1);
    for (int64_t i = 0; i < m * width; ++i) CHECK(by_column[i % width * m + i / width] == out[i]);
  }

  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      double sums[2] = {}, magnitude = 1;
      for (int64_t part = 0; part < layout.parts; ++part) {
        const int64_t row = part * width + j;
        sums[part] = bias[row];
        for (int64_t l = 0; l < k; ++l) {
          const double term = double{x[i * k + l]} * to_float(weight[row * k + l]);
          sums[part] += term, magnitude += std::abs(term);
        }
      }
      const double y = sums[0];
      const double exact = activation == Activation::kSiluGate    ? y / (1 + std::exp(-y)) * sums[1]
                           : activation == Activation::kGelu      ? y / 2 * std::erfc(-y / std::sqrt(2.0))
                           : activation == Activation::kQuickGelu ? y / (1 + std::exp(-1.702 * y))
                                                                  : y;
      const double before = is_added ? residual[i * width + j] : 0;
      CHECK(std::abs(out[i * width + j] - before - exact) <= 1e-6 * magnitude * (1 + std::abs(sums[1])));
    }
  }
}

// From bytes in rows of their own, in whatever order; only what floats cannot do is tested here.
void test_rows_of_bytes(Isa isa, int64_t m, int64_t k, int64_t width) {
  const PanelLayout layout{width, 1};
  std::vector<std::vector<uint8_t>> memory;
  std::vector<const uint8_t*> rows;
  std::vector<float> x;
  for (int64_t i = 0; i < m; ++i) memory.push_back(random_bytes(k));
  for (int64_t i = 0; i < m; ++i) rows.push_back(memory[i * 7 % m].data());
  for (const uint8_t* row : rows) {
    for (int64_t l = 0; l < k; ++l) x.push_back(static_cast<float>(row[l]) - 128);
  }
  const std::vector<float> weight = random_floats<float>(width * k), bias = random_floats<float>(width);
  std::vector<float> panels(layout.panels() * k * layout.panel()), out(m * width), of_floats(m * width);
  for (int64_t panel = 0; panel < layout.panels(); ++panel) {
    pack_linear_panel(weight.data(), layout, k, panel, panels.data() + panel * k * layout.panel());
  }
  const PackedLinear<float, ByteRows> job{.x = rows.data(),
                                          .panels = panels.data(),
                                          .scales = nullptr,
                                          .sums = nullptr,
                                          .bias = bias.data(),
                                          .out = out.data(),
                                          .block_width = width,
                                          .m = m,
                                          .k = k,
                                          .layout = layout,
                                          .activation = Activation::kNone,
                                          .is_added = false,
                                          .isa = isa};
  run_on(job, 2);
  run_on(PackedLinear<float>{x.data(), panels.data(), nullptr, nullptr, bias.data(), of_floats.data(), width, m, k,
                             layout, Activation::kNone, false, isa},
         1);
  CHECK(std::memcmp(out.data(), of_floats.data(), out.size() * sizeof(float)) == 0);
}

void test_over_white(int64_t pixels) {
  const std::vector<uint8_t> rgba = random_bytes(4 * pixels);
  std::vector<uint8_t> rgb(3 * pixels);
  over_white(rgba.data(), pixels, rgb.data());
  for (int64_t i = 0; i < 3 * pixels; ++i) {
    const int alpha = rgba[i / 3 * 4 + 3], exact = alpha * rgba[i / 3 * 4 + i % 3] + (255 - alpha) * 255;
    CHECK(std::abs(255 * rgb[i] - exact) <= 255);
  }
}

void test_jpeg_scans(size_t size) {
  std::vector<uint8_t> data(size);
  for (uint8_t& byte : data) byte = random_bytes(1)[0] % 2 ? 0xff : 0xda;
  size_t scans = 0;
  for (size_t i = 1; i < size; ++i) scans += data[i - 1] == 0xff && data[i] == 0xda;
  CHECK(count_jpeg_scans(data.data(), size) == scans);
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
  for (const int64_t count : {0, 1, 2, 63, 64, 65, 255, 256, 257, 1021}) {
    test_over_white(count);
    test_jpeg_scans(count);
  }
  for (int level = 0; level <= static_cast<int>(best_isa()); ++level) {
    const Isa isa{level};
    test_packed_linear<float>(isa, Activation::kNone, true, 1, 1, 1);
    test_packed_linear<BFloat16>(isa, Activation::kGelu, false, 29, 129, 33);
    test_packed_linear<Float16>(isa, Activation::kQuickGelu, true, 15, 256, 64);
    test_packed_linear<BFloat16>(isa, Activation::kSiluGate, false, 230, 7, 37);
    test_packed_linear<BFloat16>(isa, Activation::kSiluGate, false, 9, 16, 5);
    test_packed_linear<float>(isa, Activation::kNone, false, 3, 300, 150);
    test_packed_linear<float>(isa, Activation::kGelu, true, 20, 30, 70);
    test_rows_of_bytes(isa, 1, 1, 1);
    test_rows_of_bytes(isa, 66, 129, 33);
    test_rows_of_bytes(isa, 460, 27, 16);
    test_int8_linear(isa, 1, 1, 1);
    test_int8_linear(isa, 230, 1030, 70);
    test_packed_attention<float>(isa, {0, 1, 1, 130, 160}, 2, 10, 1e-5);
    test_packed_attention<float>(isa, {0, 40}, 1, 128, 1e-5);
    test_packed_attention<float>(isa, {0, 272}, 1, 10, 1e-4, 8);
    test_pointwise<float>(isa);
  }
}
