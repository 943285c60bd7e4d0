#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "cpu/activation.h"
#include "cpu/centre_rows.h"
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

// Writes weight[parts * width, k] to dst[k][layout.panel()]. Weight: float, BFloat16, Float16, or a word of several
// values, with k in words.
template <class Weight>
void pack_linear_panel(const Weight* weight, const PanelLayout& layout, int64_t k, int64_t panel, Weight* dst);

// out = activation(x @ weight.T + bias), or out += that, summed in float32; for kSiluGate silu(gate) * up. The output
// may be cut into blocks of columns that stand one after another in memory. With FourBytes, x is quantized row by row
// (see quantize_rows), the weight is scales * its bytes, and the products before bias and activation have the same bits
// on every instruction set. With BFloat16Pair, x is BFloat16. With ByteRows, x is 128 less than its bytes.
template <class Weight, class Rows = const float*, class Out = float>
struct PackedLinear {
  Rows x;                // [m, k]
  const Weight* panels;  // [layout.panels(), depth(), layout.panel()]
  const float* scales;   // of bytes only: [layout.parts * layout.width]
  const int32_t* sums;   // of bytes only: the sum of each row of the weight, [layout.parts * layout.width]
  const float* bias;     // [layout.parts * layout.width]
  Out* out;              // [layout.width / block_width, m, block_width]; float if is_added
  int64_t block_width;
  int64_t m, k;
  PanelLayout layout;
  Activation activation;
  bool is_added;
  Isa isa;
  int64_t threads = 1;  // that are to share the work

  int64_t depth() const { return packed_depth<Weight>(k); }

  // The work is cut into tiles, blocks of rows by groups of panels, groups running faster.
  struct Tiling {
    int64_t rows, panels;  // of a tile
  };
  Tiling tiling() const;
  int64_t tiles() const;

  // Computes tiles, each the next one that nobody has taken yet. Every element is summed over k in the same order by
  // the same instructions, so a row's bits depend neither on m nor on its place.
  void run(std::atomic<int64_t>& next_tile) const;
};

}  // namespace rtp_mm
