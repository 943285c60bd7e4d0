// A linear layer's weight in panels of columns, as `PackedLinear` reads it.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/multiply.h"

namespace rtp_mm {

constexpr int64_t kMaxPanel = 64;  // columns of a panel: four AVX-512 vectors

// Which rows of a weight [parts * width, k] stand in which columns of its panels, as few and as narrow as can be. A
// gated weight has two parts, gate above up, and each panel holds half of either, so that a tile of the product holds
// what it needs of both.
struct PanelLayout {
  int64_t width, parts;

  int64_t panels() const { return (parts * width + kMaxPanel - 1) / kMaxPanel; }
  int64_t columns() const {  // of the output, in a panel
    const int64_t units = panels() * kColumnUnit;
    return units ? (width + units - 1) / units * kColumnUnit : 0;
  }
  int64_t columns_of(int64_t panel) const { return std::min(columns(), width - panel * columns()); }  // that are there
  int64_t panel() const { return parts * columns(); }  // columns of a panel
  // The weight's row in column j of a panel; -1 for columns past the end, which are zero.
  int64_t row(int64_t panel, int64_t j) const {
    const int64_t column = panel * columns() + j % columns();
    return column < width ? j / columns() * width + column : -1;
  }
};

// Elements of a weight that stand for k values of x; words go up to a whole tile of zeros.
template <class Weight>
int64_t packed_depth(int64_t k) {
  constexpr int64_t kValues = std::is_same_v<Weight, FourBytes> ? 4 : std::is_same_v<Weight, BFloat16Pair> ? 2 : 1;
  return kValues == 1 ? k : up_to_multiple(k, kValues * kAmxSide) / kValues;
}

// How far apart rows of bfloat16s should lie that a linear layer reads: by an odd number of cache lines where AMX loads
// tiles of them, as rows of an even number would meet in few of L1's sets.
inline int64_t linear_row_stride(Isa isa, int64_t columns) {
  constexpr int64_t kLine = 2 * kAmxSide;
  return has_amx(isa) ? up_to_multiple(columns, kLine) | kLine : columns;
}

// Writes weight[parts * width, k] to dst[k][layout.panel()]. Weight: float, BFloat16, Float16, or a word of several
// values, with k in words.
template <class Weight>
void pack_linear_panel(const Weight* weight, const PanelLayout& layout, int64_t k, int64_t panel, Weight* dst);

}  // namespace rtp_mm
