#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "cpu/activation.h"
#include "cpu/centre_rows.h"
#include "cpu/isa.h"
#include "cpu/linear_panels.h"
#include "cpu/multiply.h"

namespace rtp_mm {

// out = activation(x @ weight.T + bias), or out += that, summed in float32; for kSiluGate silu(gate) * up. The output
// may be cut into blocks of columns that stand one after another in memory. With FourBytes, x is quantized row by row
// (see quantize_rows), the weight is scales * its bytes, and the products before bias and activation have the same bits
// on every instruction set. With BFloat16Pair, x is BFloat16, and AMX reads its rows where they are if x_stride is what
// `linear_row_stride` says. With ByteRows, x is 128 less than its bytes.
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
  int64_t threads = 1;               // that are to share the work
  int64_t x_stride = k;              // from row to row; of BFloat16 only
  int64_t out_stride = block_width;  // from row to row of a block

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
