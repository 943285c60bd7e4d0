// Reproducible noise for the tests.

#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "float_values.h"

namespace rtp_mm {

inline std::mt19937 generator(0);

inline std::vector<uint8_t> random_bytes(size_t size) {
  std::vector<uint8_t> values(size);
  for (uint8_t& value : values) value = static_cast<uint8_t>(generator());
  return values;
}

template <class Float>
std::vector<Float> random_floats(size_t size) {
  std::normal_distribution<float> normal;
  std::vector<Float> values;
  for (size_t i = 0; i < size; ++i) values.push_back(round_to<Float>(normal(generator)));
  return values;
}

}  // namespace rtp_mm
