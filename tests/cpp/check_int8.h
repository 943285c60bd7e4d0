// A linear layer in int8 against a naive loop, to the bit.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/packed_linear.h"
#include "random_data.h"

namespace rtp_mm {

// The integers' own arithmetic, then float32 in the order that is promised: the same bits on every instruction set.
inline void test_int8_linear(Isa isa, int64_t m, int64_t k, int64_t width) {
  const PanelLayout layout{width, 1};
  const int64_t depth = packed_depth<FourBytes>(k);
  const std::vector<float> x = random_floats<float>(m * k), bias = random_floats<float>(width);
  const std::vector<float> scales = random_floats<float>(width);
  std::vector<uint8_t> bytes = random_bytes(width * depth * 4);
  for (int64_t i = 0; i < width * depth * 4; ++i) {
    if (i % (depth * 4) >= k) bytes[i] = 0;
  }
  const auto* weight = reinterpret_cast<const int8_t*>(bytes.data());
  std::vector<FourBytes> words(width * depth), panels(layout.panels() * depth * layout.panel());
  std::memcpy(words.data(), bytes.data(), bytes.size());
  for (int64_t panel = 0; panel < layout.panels(); ++panel) {
    pack_linear_panel(words.data(), layout, depth, panel, panels.data() + panel * depth * layout.panel());
  }
  std::vector<int32_t> sums(width);
  for (int64_t i = 0; i < width * depth * 4; ++i) sums[i / (depth * 4)] += weight[i];
  std::vector<float> out(m * width);
  const PackedLinear<FourBytes> job{.x = x.data(),
                                    .panels = panels.data(),
                                    .scales = scales.data(),
                                    .sums = sums.data(),
                                    .bias = bias.data(),
                                    .out = out.data(),
                                    .block_width = width,
                                    .m = m,
                                    .k = k,
                                    .layout = layout,
                                    .activation = Activation::kNone,
                                    .is_added = false,
                                    .isa = isa};
  std::atomic<int64_t> next_tile = 0;
  job.run(next_tile);
  for (int64_t i = 0; i < m; ++i) {
    float largest = 0;
    for (int64_t l = 0; l < k; ++l) largest = std::max(largest, std::abs(x[i * k + l]));
    for (int64_t j = 0; j < width; ++j) {
      int32_t total = 0;
      for (int64_t l = 0; l < k; ++l) {
        total += static_cast<int32_t>(std::nearbyint(x[i * k + l] * (127 / largest))) * weight[j * depth * 4 + l];
      }
      CHECK(out[i * width + j] == static_cast<float>(total) * (scales[j] * (largest / 127)) + bias[j]);
    }
  }
}

}  // namespace rtp_mm
