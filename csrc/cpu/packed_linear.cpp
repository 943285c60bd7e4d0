#include "cpu/packed_linear.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include "cpu/float_formats.h"
#include "cpu/multiply.h"
#include "cpu/quantize_rows.h"
#include "cpu/simd.h"

namespace rtp_mm {
namespace {

// A tile. Its sums, the strips of one step of k (115 KB each) and the panel of that step (32 KB) stay in L2.
// The more rows, the less it costs to widen a panel; the more panels, the less often the strips are read again.
constexpr int64_t kMaxTileRows = 224;
constexpr int64_t kTilePanels = 2;
constexpr int64_t kTileColumns = kTilePanels * kMaxPanel;  // at most; rows of a tile's sums are as far apart

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles are of even height, so that threads with as many tiles have as much to do.
int64_t tile_rows(int64_t m) { return ceil_div(m, std::max<int64_t>(ceil_div(m, kMaxTileRows), 1)); }

struct Widen {
  template <class Arch, class Weight>
  RTP_MM_INLINE static void run(const Weight* weight, int64_t count, float* dst) {
    using Lanes = Wide<Arch, Weight>;
    for (int64_t i = 0; i < count; i += Lanes::kLanes) at<Lanes>(dst + i) = widened<Lanes>(weight + i);
  }
};

// sums[rows] of `panels` panels to their activated values in the output's order, in place. bias: of the panels'
// columns.
struct ActivateSums {
  template <class Arch>
  RTP_MM_INLINE static void run(float* sums, const float* bias, int64_t rows, int64_t panels, int64_t panel,
                                Activation activation) {
    for (int64_t r = 0; r < rows; ++r, sums += kTileColumns) {
      if (activation == Activation::kSiluGate) {
        const int64_t half = panel / 2;
        for (int64_t j = 0; j < panels * half; j += Arch::kLanes) {  // written behind what is read
          const int64_t gate = j / half * panel + j % half, up = gate + half;
          at<Arch>(sums + j) =
              silu_gate<Arch>(at<Arch>(sums + gate) + at<Arch>(bias + gate), at<Arch>(sums + up) + at<Arch>(bias + up));
        }
      } else {
        for (int64_t j = 0; j < panels * panel; j += Arch::kLanes) {
          at<Arch>(sums + j) = activated<Arch>(at<Arch>(sums + j) + at<Arch>(bias + j), activation);
        }
      }
    }
  }
};

// sums[rows] to `columns` of the rows of out, or added to them.
struct Write {
  static constexpr int64_t kRowsAhead = 4;  // each is in a page of its own, where no hardware looks ahead

  template <class Arch, class Out>
  RTP_MM_INLINE static void run(const float* sums, int64_t rows, int64_t columns, bool is_added, Out* out,
                                int64_t out_stride) {
    using Lanes = Wide<Arch, Out>;
    for (int64_t r = 0; r < rows; ++r, sums += kTileColumns, out += out_stride) {
      int64_t j = 0;
      for (; j + Lanes::kLanes <= columns; j += Lanes::kLanes) {
        if (r + kRowsAhead < rows) __builtin_prefetch(out + kRowsAhead * out_stride + j, 1, 3);
        const Vector<Lanes> sum = at<Lanes>(sums + j);
        narrow<Lanes>(is_added ? widened<Lanes>(out + j) + sum : sum, out + j);
      }
      for (; j < columns; ++j) narrow(is_added ? widened(out[j]) + sums[j] : sums[j], out + j);
    }
  }
};

// What the kernels read of the weight's rows that stand in a tile's columns.
struct TileColumns {
  float bias[kTileColumns], scales[kTileColumns];
  int32_t offsets[kTileColumns];
};

// Sums of bytes to the products that they stand for, in place: the bytes of x are 128 above what they mean.
struct Scale {
  template <class Arch>
  RTP_MM_INLINE static void run(float* sums, const TileColumns* columns, int64_t count, const float* row_scales,
                                int64_t rows) {
    for (int64_t r = 0; r < rows; ++r, sums += kTileColumns) {
      for (int64_t j = 0; j < count; j += Arch::kLanes) {
        const IntVector<Arch> exact = reinterpret_cast<IntVector<Arch>&>(sums[j]) - at<Arch>(columns->offsets + j);
        at<Arch>(sums + j) =
            __builtin_convertvector(exact, Vector<Arch>) * (at<Arch>(columns->scales + j) * row_scales[r]);
      }
    }
  }
};

template <class Weight, class Rows, class Out>
TileColumns tile_columns(const PackedLinear<Weight, Rows, Out>& job, int64_t first_panel, int64_t end_panel) {
  TileColumns columns{};
  const int64_t panel = job.layout.panel();
  for (int64_t j = 0; j < (end_panel - first_panel) * panel; ++j) {
    const int64_t row = job.layout.row(first_panel + j / panel, j % panel);
    if (row < 0) continue;
    columns.bias[j] = job.bias[row];
    if constexpr (std::is_same_v<Weight, FourBytes>) {
      columns.scales[j] = job.scales[row];
      columns.offsets[j] = 128 * job.sums[row];
    }
  }
  return columns;
}

// x[rows, k] as [steps of k][rows][kStripDepth].
void pack_strips(const float* x, int64_t rows, int64_t k, float* strips) {
  for (int64_t begin = 0; begin < k; begin += kStripDepth) {
    const int64_t depth = std::min(kStripDepth, k - begin);
    for (int64_t r = 0; r < rows; ++r, strips += kStripDepth) std::copy_n(x + r * k + begin, depth, strips);
  }
}

// The same of pairs; the last one of an odd k has a zero.
void pack_strips(const BFloat16* x, int64_t rows, int64_t k, BFloat16Pair* strips) {
  constexpr int64_t kDepth = 2 * kStripDepth;
  for (int64_t begin = 0; begin < k; begin += kDepth) {
    const int64_t depth = std::min(kDepth, k - begin);
    for (int64_t r = 0; r < rows; ++r, strips += kStripDepth) {
      auto* strip = reinterpret_cast<BFloat16*>(strips);
      std::copy_n(x + r * k + begin, depth, strip);
      if (depth % 2) strip[depth] = {};
    }
  }
}

// What a weight is multiplied as: 16-bit floats are widened first.
template <class Weight>
using WordOf = std::conditional_t<sizeof(Weight) == sizeof(uint16_t), float, Weight>;

// What the product reads of `count` elements of the weight.
template <class Weight>
const WordOf<Weight>* widened_panel(Isa isa, const Weight* weight, int64_t count, float* scratch) {
  if constexpr (std::is_same_v<Weight, WordOf<Weight>>) {
    return weight;
  } else {
    rtp_mm::run<Widen>(isa, weight, count, scratch);
    return scratch;
  }
}

// A square of elements, a row of it 16 bytes: what the vectors of every CPU hold.
template <class Weight>
struct Square {
  static constexpr int kSide = 16 / sizeof(Weight);
  using Element = std::conditional_t<sizeof(Weight) == sizeof(uint16_t), uint16_t, uint32_t>;
  typedef Element Row __attribute__((vector_size(16), aligned(sizeof(Element)), may_alias));
};

// Element j of rows[i] to element i of rows[j]: each round zips the first half of the rows with the second.
template <class Weight, class Row = typename Square<Weight>::Row>
RTP_MM_INLINE void transpose_square(Row (&rows)[Square<Weight>::kSide]) {
  constexpr int kSide = Square<Weight>::kSide, kHalf = kSide / 2;
  Row low, high;  // which elements of two rows, one after the other
  for (int j = 0; j < kSide; ++j) {
    low[j] = j / 2 + j % 2 * kSide;
    high[j] = low[j] + kHalf;
  }
  for (int round = 1; round < kSide; round *= 2) {
    Row zipped[kSide];
    for (int i = 0; i < kHalf; ++i) {
      zipped[2 * i] = __builtin_shuffle(rows[i], rows[i + kHalf], low);
      zipped[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kHalf], high);
    }
    std::copy_n(zipped, kSide, rows);
  }
}

}  // namespace

template <class Weight>
void pack_linear_panel(const Weight* weight, const PanelLayout& layout, int64_t k, int64_t panel, Weight* dst) {
  using Row = typename Square<Weight>::Row;
  constexpr int64_t kSide = Square<Weight>::kSide;
  constexpr int64_t kLine = 64 / sizeof(Weight);  // steps of k in a line of the cache; dst's 8 KB of them stay in L1
  constexpr int64_t kAhead = 4 * kLine;           // 64 rows are read side by side, too many for hardware to look ahead
  const int64_t columns = layout.panel();
  static_assert(kColumnUnit % kSide == 0);
  for (int64_t begin = 0; begin < k; begin += kLine) {
    const int64_t end = std::min(begin + kLine, k);
    for (int64_t j = 0; j < columns; j += kSide) {
      const Weight* sources[kSide];  // null past the last
      for (int64_t s = 0; s < kSide; ++s) {
        const int64_t row = layout.row(panel, j + s);
        sources[s] = row < 0 ? nullptr : weight + row * k;
        if (row >= 0 && begin + kAhead < k) __builtin_prefetch(sources[s] + begin + kAhead);
      }
      int64_t i = begin;
      for (; i + kSide <= end; i += kSide) {
        Row rows[kSide];
        for (int64_t s = 0; s < kSide; ++s) {
          rows[s] = sources[s] ? *reinterpret_cast<const Row*>(sources[s] + i) : Row{};
        }
        transpose_square<Weight>(rows);
        for (int64_t s = 0; s < kSide; ++s) *reinterpret_cast<Row*>(dst + (i + s) * columns + j) = rows[s];
      }
      for (; i < end; ++i) {
        for (int64_t s = 0; s < kSide; ++s) dst[i * columns + j + s] = sources[s] ? sources[s][i] : Weight{};
      }
    }
  }
}

template <class Weight, class Rows, class Out>
int64_t PackedLinear<Weight, Rows, Out>::tiles() const {
  return ceil_div(m, kMaxTileRows) * ceil_div(layout.panels(), kTilePanels);
}

template <class Weight, class Rows, class Out>
void PackedLinear<Weight, Rows, Out>::run(std::atomic<int64_t>& next_tile) const {
  constexpr bool kIsBytes = std::is_same_v<Weight, FourBytes>;
  using Word = WordOf<Weight>;
  const int64_t panel_count = layout.panels(), panel_columns = layout.panel(),
                groups = ceil_div(panel_count, kTilePanels), end = tiles();
  const int64_t block_rows = tile_rows(m), words = depth(), steps = ceil_div(words, kStripDepth);
  const std::unique_ptr<Word[]> strips(new Word[block_rows * steps * kStripDepth]);
  const std::unique_ptr<float[]> sums(new float[block_rows * kTileColumns]);
  alignas(64) float panel_scratch[kStripDepth * kMaxPanel];
  float row_scales[kMaxTileRows];
  int64_t packed_block = -1;
  for (int64_t tile; (tile = next_tile.fetch_add(1, std::memory_order_relaxed)) < end;) {
    const int64_t block = tile / groups, first_row = block * block_rows, rows = std::min(block_rows, m - first_row);
    if (packed_block != block) {
      packed_block = block;
      if constexpr (std::is_same_v<Rows, ByteRows>) {
        centre_rows(isa, x + first_row, rows, k, strips.get());
      } else if constexpr (kIsBytes) {
        quantize_rows(isa, x + first_row * k, rows, k, strips.get(), row_scales);
      } else {
        pack_strips(x + first_row * k, rows, k, strips.get());
      }
    }
    const int64_t first_panel = tile % groups * kTilePanels,
                  end_panel = std::min(first_panel + kTilePanels, panel_count);
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t depth = std::min(kStripDepth, words - step * kStripDepth);
      for (int64_t panel = first_panel; panel < end_panel; ++panel) {
        const Weight* weight = panels + (panel * words + step * kStripDepth) * panel_columns;
        const Word* wide = widened_panel(isa, weight, depth * panel_columns, panel_scratch);
        const bool is_last = panel + 1 == end_panel;
        const Weight* next =
            is_last ? weight + (depth + (first_panel - panel) * words) * panel_columns : weight + words * panel_columns;
        multiply(isa, strips.get() + step * rows * kStripDepth,
                 {.rows = rows,
                  .columns = panel_columns,
                  .depth = depth,
                  .panel = wide,
                  .panel_stride = panel_columns,
                  .sums = reinterpret_cast<Sum<Word>*>(sums.get()) + (panel - first_panel) * panel_columns,
                  .sums_stride = kTileColumns,
                  .is_added = step > 0},
                 {next, depth * panel_columns * static_cast<int64_t>(sizeof(Weight))});
      }
    }
    const TileColumns tile_columns = rtp_mm::tile_columns(*this, first_panel, end_panel);
    if constexpr (kIsBytes) {
      rtp_mm::run<Scale>(isa, sums.get(), &tile_columns, (end_panel - first_panel) * panel_columns,
                         static_cast<const float*>(row_scales), rows);
    }
    rtp_mm::run<ActivateSums>(isa, sums.get(), static_cast<const float*>(tile_columns.bias), rows,
                              end_panel - first_panel, panel_columns, activation);
    const int64_t first = first_panel * layout.columns(),
                  end_column = std::min(end_panel * layout.columns(), layout.width);
    for (int64_t column = first; column < end_column;) {
      const int64_t begin = column % block_width, columns = std::min(block_width - begin, end_column - column);
      rtp_mm::run<Write>(isa, static_cast<const float*>(sums.get()) + column - first, rows, columns, is_added,
                         out + (column / block_width * m + first_row) * block_width + begin, block_width);
      column += columns;
    }
  }
}

template void pack_linear_panel(const float*, const PanelLayout&, int64_t, int64_t, float*);
template void pack_linear_panel(const BFloat16*, const PanelLayout&, int64_t, int64_t, BFloat16*);
template void pack_linear_panel(const Float16*, const PanelLayout&, int64_t, int64_t, Float16*);
template void pack_linear_panel(const FourBytes*, const PanelLayout&, int64_t, int64_t, FourBytes*);
template void pack_linear_panel(const BFloat16Pair*, const PanelLayout&, int64_t, int64_t, BFloat16Pair*);
template struct PackedLinear<float>;
template struct PackedLinear<BFloat16>;
template struct PackedLinear<Float16>;
template struct PackedLinear<FourBytes>;
template struct PackedLinear<float, ByteRows>;
template struct PackedLinear<BFloat16Pair, const BFloat16*, BFloat16>;
template struct PackedLinear<BFloat16Pair, const BFloat16*, float>;

}  // namespace rtp_mm
