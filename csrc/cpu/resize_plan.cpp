#include "cpu/resize_plan.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "cpu/isa.h"
#include "cpu/resize_windows.h"
#include "shared_cache.h"

namespace rtp_mm {
namespace {

constexpr int64_t kRunQuads = 64;          // 12 KB of columns: with what is written beside them, within L1
constexpr int64_t kCacheBytes = 16 << 20;  // some 300 axes of photographs
constexpr int64_t kMaxCoefficient =
    8355711;  // three balanced signed bytes: 0x7f7f7f, nearly 2.0; weights stay below 1.3

void append(ResizeAxis& axis, const ResizeWindow& window, const ResizeKernels& kernels) {
  const int64_t offset = window.first % 4, taps = static_cast<int64_t>(window.coefficients.size());
  const int64_t count = (taps + 3) / 4;
  std::vector<int32_t> bytes(4 * count);
  for (int64_t i = 0; i < taps; ++i) {
    if (std::abs(window.coefficients[i]) > kMaxCoefficient) throw std::logic_error("a resize coefficient over 2");
    bytes[(offset + i) % (4 * count)] = window.coefficients[i];
  }
  const uint32_t mask = offset + taps > 4 * count ? ~0u << (8 * offset) : ~0u;
  axis.outputs.push_back({static_cast<int32_t>(window.first / 4), static_cast<int32_t>(count), mask,
                          static_cast<int32_t>(axis.taps.size())});
  for (int64_t quad = 0; quad < count; ++quad) axis.taps.push_back(kernels.encode(bytes.data() + 4 * quad));
}

std::vector<OutputRun> runs_of(const std::vector<OutputTaps>& outputs) {
  std::vector<OutputRun> runs;
  for (int64_t i = 0; i < static_cast<int64_t>(outputs.size()); i += 4) {
    OutputRun four{i, i + 4, outputs[i].first, 0};
    for (int64_t j = i; j < i + 4; ++j) {
      four.first_quad = std::min<int64_t>(four.first_quad, outputs[j].first);
      four.end_quad = std::max(four.end_quad, quads_of(outputs[j]).end);
    }
    if (!runs.empty()) {
      OutputRun& run = runs.back();
      const int64_t first = std::min(run.first_quad, four.first_quad), end = std::max(run.end_quad, four.end_quad);
      if (end - first <= kRunQuads) {
        run = {run.begin, four.end, first, end};
        continue;
      }
    }
    runs.push_back(four);
  }
  return runs;
}

std::vector<QuadRange> needed_quads(const std::vector<OutputTaps>& outputs) {
  std::vector<QuadRange> needed;
  needed.reserve(outputs.size());
  std::transform(outputs.begin(), outputs.end(), std::back_inserter(needed), quads_of);
  for (size_t i = 1; i < needed.size(); ++i) needed[i].end = std::max(needed[i].end, needed[i - 1].end);
  for (size_t i = needed.size() - 1; i-- > 0;) needed[i].begin = std::min(needed[i].begin, needed[i + 1].begin);
  return needed;
}

constexpr int64_t kBlockOutputs = 16;

// Blocks of all outputs, or none if the first four taps of one are not all within 64 bytes: up to a scale of 1.13.
void make_blocks(ResizeAxis& axis, const std::vector<ResizeWindow>& windows) {
  for (size_t begin = 0; begin < windows.size(); begin += kBlockOutputs) {
    const auto window = [&](size_t lane) -> const ResizeWindow& {
      return windows[std::min(begin + lane, windows.size() - 1)];
    };
    OutputBlock block{{}, window(0).first, 0, static_cast<int64_t>(axis.block_taps.size())};
    for (size_t lane = 0; lane < kBlockOutputs; ++lane) {
      block.first = std::min(block.first, window(lane).first);
      block.count = std::max<int64_t>(block.count, (window(lane).coefficients.size() + 3) / 4);
    }
    axis.block_taps.resize(block.taps + block.count);
    for (size_t lane = 0; lane < kBlockOutputs; ++lane) {
      const int64_t offset = window(lane).first - block.first;
      if (kChannels * (offset + 4) > kBlock) {
        axis.blocks.clear();
        axis.block_taps.clear();
        return;
      }
      for (int64_t channel = 0; channel < kChannels; ++channel) {
        for (int64_t tap = 0; tap < 4; ++tap) {
          block.places[channel][4 * lane + tap] = static_cast<uint8_t>(kChannels * (offset + tap) + channel);
        }
      }
      const std::vector<int32_t>& coefficients = window(lane).coefficients;
      const auto size = static_cast<int64_t>(coefficients.size());
      for (int64_t quad = 0; 4 * quad < size; ++quad) {
        int32_t four[4] = {};
        std::copy_n(coefficients.begin() + 4 * quad, std::min<int64_t>(4, size - 4 * quad), four);
        const QuadTaps taps = signed_byte_taps(four);
        for (int part = 0; part < 3; ++part) axis.block_taps[block.taps + quad].words[part][lane] = taps.words[part];
      }
    }
    axis.blocks.push_back(block);
  }
}

ResizeAxis make_axis(int64_t size, int64_t out_size, bool is_horizontal, ResizeFilter filter, ResizeLevel level) {
  const ResizeKernels& kernels = resize_kernels(level);
  ResizeAxis axis{};
  axis.outputs.reserve((out_size + 3) / 4 * 4);
  const std::vector<ResizeWindow> windows = resize_windows(size, out_size, filter);
  for (const ResizeWindow& window : windows) append(axis, window, kernels);
  if (is_horizontal && kernels.horizontal_blocks) make_blocks(axis, windows);
  while (axis.outputs.size() % 4) axis.outputs.push_back(axis.outputs.back());
  axis.runs = runs_of(axis.outputs);
  axis.needed = needed_quads(axis.outputs);
  return axis;
}

}  // namespace

std::shared_ptr<const ResizeAxis> resize_axis(int64_t size, int64_t out_size, bool is_horizontal, ResizeFilter filter,
                                              ResizeLevel level) {
  using Key = std::tuple<int64_t, int64_t, bool, ResizeFilter, ResizeLevel>;
  static SharedCache<Key, ResizeAxis> cache(kCacheBytes);
  return cache.get({size, out_size, is_horizontal, filter, level}, [&] {
    ResizeAxis axis = make_axis(size, out_size, is_horizontal, filter, level);
    const size_t bytes = axis.outputs.capacity() * (sizeof(OutputTaps) + sizeof(QuadRange)) +
                         axis.taps.capacity() * sizeof(QuadTaps) + axis.blocks.capacity() * sizeof(OutputBlock) +
                         axis.block_taps.capacity() * sizeof(BlockTaps);
    return std::pair(std::move(axis), static_cast<int64_t>(bytes + sizeof(ResizeAxis)));
  });
}

const ResizeKernels& resize_kernels([[maybe_unused]] ResizeLevel level) {
#if defined(__x86_64__)
  if (level == ResizeLevel::kAvx512Vbmi) return kResizeAvx512Vbmi;
  if (level == ResizeLevel::kAvx512Vnni) return kResizeAvx512Vnni;
  if (level == ResizeLevel::kAvx2) return kResizeAvx2;
#elif defined(__aarch64__)
  if (level == ResizeLevel::kNeonI8mm) return kResizeNeonI8mm;
#endif
  return kResizePortable;
}

ResizeLevel best_resize_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vnni")) {
    return __builtin_cpu_supports("avx512vbmi") ? ResizeLevel::kAvx512Vbmi : ResizeLevel::kAvx512Vnni;
  }
  if (__builtin_cpu_supports("avx2")) return ResizeLevel::kAvx2;
#elif defined(__aarch64__)
  if (best_isa() == Isa::kNeonI8mm) return ResizeLevel::kNeonI8mm;
#endif
  return ResizeLevel::kPortable;
}

}  // namespace rtp_mm
