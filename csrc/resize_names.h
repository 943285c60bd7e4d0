// What Python calls the filters and the pass orders.

#pragma once

#include <array>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/resize_windows.h"

namespace rtp_mm {

constexpr std::array kFilters = {
    std::pair{"nearest", ResizeFilter::kNearest},   std::pair{"box", ResizeFilter::kBox},
    std::pair{"bilinear", ResizeFilter::kBilinear}, std::pair{"hamming", ResizeFilter::kHamming},
    std::pair{"bicubic", ResizeFilter::kBicubic},   std::pair{"lanczos", ResizeFilter::kLanczos}};

constexpr std::array kIsVerticalFirst = {std::pair{"horizontal", false}, std::pair{"vertical", true}};

// The value of a name in a table like those above. Raises ValueError through pybind11, RuntimeError through torch.
template <class Table>
auto lookup(const Table& table, const char* what, const std::string& name) {
  std::string names;
  for (const auto& [known, value] : table) {
    if (name == known) return value;
    names += names.empty() ? "" : ", ";
    names += known;
  }
  throw std::invalid_argument("resize_patchify: " + std::string(what) + " must be one of " + names + ", got " + name);
}

}  // namespace rtp_mm
