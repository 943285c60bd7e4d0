#include "cpu/resize_windows.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <stdexcept>

namespace rtp_mm {
namespace {

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

// Pillow's, operation by operation: a double that differs in its last bit may round to another coefficient.
ResizeWindow filtered_window(int64_t size, int64_t out_size, int64_t output, const FilterCurve& filter) {
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
  ResizeWindow window{first, {}};
  for (double weight : weights) {
    if (sum != 0) weight /= sum;
    weight *= 1 << kFractionBits;
    window.coefficients.push_back(static_cast<int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5));
  }
  return window;
}

void trim_zeros(ResizeWindow& window) {
  std::vector<int32_t>& values = window.coefficients;
  while (values.size() > 1 && values.back() == 0) values.pop_back();
  const auto is_nonzero = [](int32_t value) { return value != 0; };
  const auto begin = std::find_if(values.begin(), values.end() - 1, is_nonzero);
  window.first += begin - values.begin();
  values.erase(values.begin(), begin);
}

}  // namespace

std::vector<ResizeWindow> resize_windows(int64_t size, int64_t out_size, ResizeFilter filter) {
  const double scale = static_cast<double>(size) / static_cast<double>(out_size);
  double nearest = 0.5 * scale;  // Pillow adds up the scale, rounding as it goes
  std::vector<ResizeWindow> windows;
  windows.reserve(out_size);
  for (int64_t i = 0; i < out_size; ++i, nearest += scale) {
    if (size == out_size) {
      windows.push_back({i, {1 << kFractionBits}});
    } else if (filter == ResizeFilter::kNearest) {
      windows.push_back({std::min(static_cast<int64_t>(nearest), size - 1), {1 << kFractionBits}});
    } else {
      windows.push_back(filtered_window(size, out_size, i, curve(filter)));
      trim_zeros(windows.back());
    }
  }
  return windows;
}

}  // namespace rtp_mm
