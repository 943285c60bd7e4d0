#include "cpu/resize_plan.h"

#include <algorithm>
#include <cmath>
#include <list>
#include <mutex>
#include <numbers>
#include <stdexcept>
#include <tuple>

namespace rtp_mm {
namespace {

constexpr int64_t kRunQuads = 64;          // 12 KB of columns: with what is written beside them, within L1
constexpr int64_t kCacheBytes = 16 << 20;  // some 300 axes of photographs
constexpr int64_t kMaxCoefficient =
    8355711;  // three balanced signed bytes: 0x7f7f7f, nearly 2.0; weights stay below 1.3

struct FilterCurve {
  double (*weight)(double x);
  double support;  // in input pixels, where the image is not reduced
};

double box(double x) { return x > -0.5 && x <= 0.5 ? 1 : 0; }

double bilinear(double x) {
  x = std::abs(x);
  return x < 1 ? 1 - x : 0;
}

double hamming(double x) {
  x = std::abs(x);
  if (x == 0) return 1;
  if (x >= 1) return 0;
  x *= std::numbers::pi;
  return std::sin(x) / x * (0.54 + 0.46 * std::cos(x));
}

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

double sinc(double x) {
  if (x == 0) return 1;
  x *= std::numbers::pi;
  return std::sin(x) / x;
}

double lanczos(double x) { return -3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0; }

FilterCurve curve(ResizeFilter filter) {
  switch (filter) {
    case ResizeFilter::kBox:
      return {box, 0.5};
    case ResizeFilter::kBilinear:
      return {bilinear, 1};
    case ResizeFilter::kHamming:
      return {hamming, 1};
    case ResizeFilter::kBicubic:
      return {bicubic, 2};
    case ResizeFilter::kLanczos:
      return {lanczos, 3};
    case ResizeFilter::kNearest:
      break;
  }
  throw std::logic_error("nearest has no curve");
}

// The coefficients of one output: those of input pixels first, first + 1, ...
struct Window {
  int64_t first;
  std::vector<int32_t> coefficients;
};

// Pillow's, operation by operation: a double that differs in its last bit may round to another coefficient.
Window filtered_window(int64_t size, int64_t out_size, int64_t output, const FilterCurve& filter) {
  const double scale = static_cast<double>(size) / static_cast<double>(out_size);
  const double filter_scale = std::max(scale, 1.0), support = filter.support * filter_scale;
  const double centre = (static_cast<double>(output) + 0.5) * scale, inverse = 1.0 / filter_scale;
  const int64_t first = std::max(static_cast<int64_t>(centre - support + 0.5), int64_t{0});
  const int64_t end = std::min(static_cast<int64_t>(centre + support + 0.5), size);
  std::vector<double> weights;
  double sum = 0;
  for (int64_t i = first; i < end; ++i) {
    weights.push_back(filter.weight((static_cast<double>(i) - centre + 0.5) * inverse));
    sum += weights.back();
  }
  Window window{first, {}};
  for (double weight : weights) {
    if (sum != 0) weight /= sum;
    weight *= 1 << kFractionBits;
    window.coefficients.push_back(static_cast<int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5));
  }
  return window;
}

void trim_zeros(Window& window) {
  std::vector<int32_t>& values = window.coefficients;
  while (values.size() > 1 && values.back() == 0) values.pop_back();
  const auto is_nonzero = [](int32_t value) { return value != 0; };
  const auto begin = std::find_if(values.begin(), values.end() - 1, is_nonzero);
  window.first += begin - values.begin();
  values.erase(values.begin(), begin);
}

void append(ResizeAxis& axis, const Window& window, const ResizeKernels& kernels) {
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
  axis.most_quads = std::max(axis.most_quads, count + 1);
  for (int64_t quad = 0; quad < count; ++quad) axis.taps.push_back(kernels.encode(bytes.data() + 4 * quad));
}

std::vector<OutputRun> runs_of(const std::vector<OutputTaps>& outputs) {
  std::vector<OutputRun> runs;
  for (int64_t i = 0; i < static_cast<int64_t>(outputs.size()); i += 4) {
    OutputRun four{i, i + 4, outputs[i].first, 0};
    for (int64_t j = i; j < i + 4; ++j) {
      four.first_quad = std::min<int64_t>(four.first_quad, outputs[j].first);
      four.end_quad = std::max(four.end_quad, last_quad(outputs[j]) + 1);
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

int64_t span_of(const std::vector<OutputTaps>& outputs) {
  std::vector<int64_t> last(outputs.size());
  for (size_t i = 0; i < outputs.size(); ++i) last[i] = std::max(last_quad(outputs[i]), i ? last[i - 1] : 0);
  int64_t first = last.back(), span = 0;
  for (size_t i = outputs.size(); i-- > 0;) {
    first = std::min<int64_t>(first, outputs[i].first);
    span = std::max(span, last[i] - first + 1);
  }
  return span;
}

ResizeAxis make_axis(int64_t size, int64_t out_size, ResizeFilter filter, ResizeLevel level) {
  const ResizeKernels& kernels = resize_kernels(level);
  const double scale = static_cast<double>(size) / static_cast<double>(out_size);
  double nearest = 0.5 * scale;  // Pillow adds up the scale, rounding as it goes
  ResizeAxis axis{};
  axis.outputs.reserve((out_size + 3) / 4 * 4);
  for (int64_t i = 0; i < out_size; ++i, nearest += scale) {
    if (size == out_size) {
      append(axis, {i, {1 << kFractionBits}}, kernels);
    } else if (filter == ResizeFilter::kNearest) {
      append(axis, {std::min(static_cast<int64_t>(nearest), size - 1), {1 << kFractionBits}}, kernels);
    } else {
      Window window = filtered_window(size, out_size, i, curve(filter));
      trim_zeros(window);
      append(axis, window, kernels);
    }
  }
  while (axis.outputs.size() % 4) axis.outputs.push_back(axis.outputs.back());
  axis.runs = runs_of(axis.outputs);
  axis.span = span_of(axis.outputs);
  return axis;
}

class AxisCache {
 public:
  using Key = std::tuple<int64_t, int64_t, ResizeFilter, ResizeLevel>;

  std::shared_ptr<const ResizeAxis> get(const Key& key) {
    if (auto axis = find(key)) return axis;
    auto axis = std::make_shared<const ResizeAxis>(std::apply(make_axis, key));  // unlocked: others go on
    insert(key, axis);
    return axis;
  }

 private:
  struct Entry {
    Key key;
    std::shared_ptr<const ResizeAxis> axis;
    int64_t bytes;
  };

  std::shared_ptr<const ResizeAxis> find(const Key& key) {
    const std::lock_guard lock(mutex_);
    const auto entry = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.key == key; });
    if (entry == entries_.end()) return nullptr;
    entries_.splice(entries_.begin(), entries_, entry);
    return entry->axis;
  }

  void insert(const Key& key, std::shared_ptr<const ResizeAxis> axis) {
    const int64_t bytes = static_cast<int64_t>(axis->outputs.capacity() * sizeof(OutputTaps) +
                                               axis->taps.capacity() * sizeof(QuadTaps) + sizeof(ResizeAxis));
    const std::lock_guard lock(mutex_);
    entries_.push_front({key, std::move(axis), bytes});
    bytes_ += bytes;
    for (; bytes_ > kCacheBytes; entries_.pop_back()) bytes_ -= entries_.back().bytes;
  }

  std::mutex mutex_;
  std::list<Entry> entries_;  // most recently used first
  int64_t bytes_ = 0;
};

}  // namespace

std::shared_ptr<const ResizeAxis> resize_axis(int64_t size, int64_t out_size, ResizeFilter filter, ResizeLevel level) {
  static AxisCache cache;
  return cache.get({size, out_size, filter, level});
}

const ResizeKernels& resize_kernels(ResizeLevel level) {
#ifdef __x86_64__
  if (level == ResizeLevel::kAvx512Vnni) return kResizeAvx512Vnni;
  if (level == ResizeLevel::kAvx2) return kResizeAvx2;
#endif
  static_cast<void>(level);
  return kResizePortable;
}

ResizeLevel best_resize_level() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vnni")) {
    return ResizeLevel::kAvx512Vnni;
  }
  if (__builtin_cpu_supports("avx2")) return ResizeLevel::kAvx2;
#endif
  return ResizeLevel::kPortable;
}

}  // namespace rtp_mm
