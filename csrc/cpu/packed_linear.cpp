#include "cpu/packed_linear.h"

#include <algorithm>
#include <type_traits>

#include "cpu/aligned.h"
#include "cpu/float_formats.h"
#include "cpu/multiply.h"
#include "cpu/multiply_amx.h"
#include "cpu/quantize_rows.h"
#include "cpu/simd.h"

namespace rtp_mm {
namespace {

// A tile. Its sums, the strips of one step of k (115 KB each) and the panel of that step (32 KB) stay in L2.
// The more rows, the less it costs to widen a panel; the more panels, the less often the strips are read again.
constexpr int64_t kMaxTileRows = 224;
constexpr int64_t kTilePanels = 2;
constexpr int64_t kMaxAmxRows = 512;                       // of a block, where products are AMX's
constexpr int64_t kMaxAmxDepth = 1280;                     // of a step of AMX in words: a panel of it takes 320 KB
constexpr int64_t kTileColumns = kTilePanels * kMaxPanel;  // at most; rows of a tile's sums are as far apart

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
  static constexpr int64_t kRowsWrittenAhead = 4;  // each is in a page of its own, where no hardware looks ahead

  template <class Arch, class Out>
  RTP_MM_INLINE static void run(const float* sums, int64_t rows, int64_t columns, bool is_added, Out* out,
                                int64_t out_stride) {
    using Lanes = Wide<Arch, Out>;
    for (int64_t r = 0; r < rows; ++r, sums += kTileColumns, out += out_stride) {
      int64_t j = 0;
      for (; j + Lanes::kLanes <= columns; j += Lanes::kLanes) {
        if (r + kRowsWrittenAhead < rows) __builtin_prefetch(out + kRowsWrittenAhead * out_stride + j, 1, 3);
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

// x[rows, k] as [steps of k][rows][strip_depth].
void pack_strips(const float* x, int64_t rows, int64_t k, int64_t strip_depth, float* strips) {
  for (int64_t begin = 0; begin < k; begin += strip_depth) {
    const int64_t depth = std::min(strip_depth, k - begin);
    for (int64_t r = 0; r < rows; ++r, strips += strip_depth) std::copy_n(x + r * k + begin, depth, strips);
  }
}

// The same of pairs, with zeros up to the depth that is multiplied.
void pack_strips(const BFloat16* x, int64_t rows, int64_t k, int64_t strip_depth, BFloat16Pair* strips) {
  for (int64_t begin = 0; begin < k; begin += 2 * strip_depth) {
    const int64_t depth = std::min(2 * strip_depth, k - begin), padded = 2 * packed_depth<BFloat16Pair>(depth);
    for (int64_t r = 0; r < rows; ++r, strips += strip_depth) {
      auto* strip = reinterpret_cast<BFloat16*>(strips);
      std::fill(std::copy_n(x + r * k + begin, depth, strip), strip + padded, BFloat16{});
    }
  }
}

template <class Weight>
constexpr bool kIsWords = std::is_same_v<Weight, FourBytes> || std::is_same_v<Weight, BFloat16Pair>;

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

// What one thread holds: the rows of the block it works at, packed, and the sums of a tile.
template <class Weight, class Rows, class Out>
class Workspace {
  using Job = PackedLinear<Weight, Rows, Out>;
  using Word = WordOf<Weight>;
  static constexpr bool kIsBytes = std::is_same_v<Weight, FourBytes>;

 public:
  explicit Workspace(const Job& job)
      : job_(job),
        by_amx_(kIsWords<Weight> && has_amx(job.isa)),
        words_(job.depth()),
        strip_depth_(by_amx_ ? words_ : kStripDepth),
        steps_(ceil_div(words_, strip_depth_)),
        amx_depth_(up_to_multiple(ceil_div(words_, ceil_div(words_, kMaxAmxDepth)), kAmxSide)),
        panel_(job.layout.panel()),
        tiling_(job.tiling()),
        groups_(ceil_div(job.layout.panels(), tiling_.panels)),
        strips_(tiling_.rows * steps_ * strip_depth_),
        sums_(up_to_multiple(tiling_.rows, kSquareRows) * kTileColumns),
        amx_tiles_(by_amx_) {}

  void run(int64_t tile) {
    take_block(tile / groups_);
    const int64_t first = tile % groups_ * tiling_.panels, end = std::min(first + tiling_.panels, job_.layout.panels());
    if constexpr (kIsWords<Weight>) {
      if (by_amx_) return multiply_by_amx(first, end);
    }
    multiply_by_steps(first, end);
    finish(sums_.data(), tile_columns(job_, first, end), 0, rows_, first, end);
  }

 private:
  // Packs its rows, unless it is there, or AMX's tiles can read them where they are.
  void take_block(int64_t block) {
    if (block == block_) return;
    block_ = block;
    first_row_ = block * tiling_.rows;
    rows_ = std::min(tiling_.rows, job_.m - first_row_);
    left_ = strips_.data();
    if constexpr (std::is_same_v<Rows, ByteRows>) {
      centre_rows(job_.isa, job_.x + first_row_, rows_, job_.k, strips_.data());
    } else if constexpr (kIsBytes) {
      quantize_rows(job_.isa, rows_of_x(), rows_, job_.k, strip_depth_, strips_.data(), row_scales_);
    } else if (by_amx_ && 2 * words_ == job_.k && rows_ % kAmxSide == 0) {
      left_ = reinterpret_cast<const Word*>(rows_of_x());
    } else {
      pack_strips(rows_of_x(), rows_, job_.k, strip_depth_, strips_.data());
    }
  }

  auto rows_of_x() const { return job_.x + first_row_ * job_.k; }

  // Steps of k in turn, each for all of the panels: what they read and add to stays in L2.
  void multiply_by_steps(int64_t first_panel, int64_t end_panel) {
    for (int64_t step = 0; step < steps_; ++step) {
      const int64_t depth = std::min(kStripDepth, words_ - step * kStripDepth);
      for (int64_t panel = first_panel; panel < end_panel; ++panel) {
        const Weight* weight = job_.panels + (panel * words_ + step * kStripDepth) * panel_;
        const bool is_last = panel + 1 == end_panel;
        const Weight* next =
            is_last ? weight + (depth + (first_panel - panel) * words_) * panel_ : weight + words_ * panel_;
        multiply(job_.isa, left_ + step * rows_ * kStripDepth,
                 {.rows = rows_,
                  .columns = panel_,
                  .depth = depth,
                  .panel = widened_panel(job_.isa, weight, depth * panel_, panel_scratch_),
                  .panel_stride = panel_,
                  .sums = reinterpret_cast<Sum<Word>*>(sums_.data()) + (panel - first_panel) * panel_,
                  .sums_stride = kTileColumns,
                  .is_added = step > 0},
                 {next, depth * panel_ * static_cast<int64_t>(sizeof(Weight))});
      }
    }
  }

  // A few rows at a time, whose sums are finished while they are in L1. AMX holds more sums than it can load and store
  // beside its products, so steps of k are as long as L2 allows.
  void multiply_by_amx(int64_t first_panel, int64_t end_panel) {
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      const TileColumns columns = tile_columns(job_, panel, panel + 1);
      for (int64_t step = 0; step < words_; step += amx_depth_) {
        const int64_t depth = std::min(amx_depth_, words_ - step);
        const Word* weight = job_.panels + (panel * words_ + step) * panel_;
        const int64_t bytes = depth * panel_ * sizeof(Word);  // of this step, and those to fetch of the next
        for (int64_t row = 0; row < rows_; row += kSquareRows) {
          const int64_t rows = std::min(kSquareRows, rows_ - row);
          float* sums = sums_.data() + (amx_depth_ < words_ ? row * kTileColumns : 0);
          AmxProduct<Word> product(
              left_ + row * words_ + step, words_,
              {.rows = rows,
               .columns = panel_,
               .depth = depth,
               .panel = weight,
               .panel_stride = panel_,
               .sums = reinterpret_cast<Sum<Word>*>(sums),
               .sums_stride = kTileColumns,
               .is_added = step > 0},
              {reinterpret_cast<const char*>(weight) + bytes + bytes * row / rows_, bytes * rows / rows_});
          product.finish();
          if (step + depth == words_) finish(sums, columns, row, rows, panel, panel + 1);
        }
      }
    }
  }

  // The sums of rows of the block, from `row` on, and of panels to where they belong in the output.
  void finish(float* sums, const TileColumns& columns, int64_t row, int64_t rows, int64_t first_panel,
              int64_t end_panel) {
    const int64_t panels = end_panel - first_panel;
    if constexpr (kIsBytes) {
      rtp_mm::run<Scale>(job_.isa, sums, &columns, panels * panel_, static_cast<const float*>(row_scales_ + row), rows);
    }
    rtp_mm::run<ActivateSums>(job_.isa, sums, static_cast<const float*>(columns.bias), rows, panels, panel_,
                              job_.activation);
    const int64_t first = first_panel * job_.layout.columns(),
                  end = std::min(end_panel * job_.layout.columns(), job_.layout.width);
    for (int64_t column = first; column < end;) {
      const int64_t begin = column % job_.block_width, count = std::min(job_.block_width - begin, end - column);
      Out* out = job_.out + (column / job_.block_width * job_.m + first_row_ + row) * job_.block_width + begin;
      rtp_mm::run<Write>(job_.isa, static_cast<const float*>(sums) + column - first, rows, count, job_.is_added, out,
                         job_.block_width);
      column += count;
    }
  }

  static constexpr int64_t kSquareRows = 2 * kAmxSide;

  const Job& job_;
  const bool by_amx_;
  const int64_t words_, strip_depth_, steps_, amx_depth_, panel_;
  const typename Job::Tiling tiling_;
  const int64_t groups_;
  AlignedVector<Word> strips_;  // [steps of k][rows][strip_depth_]
  AlignedVector<float> sums_;   // [rows][kTileColumns]
  const AmxTiles amx_tiles_;
  const Word* left_ = nullptr;  // the strips, or the rows of x
  int64_t block_ = -1, first_row_ = 0, rows_ = 0;
  float row_scales_[kMaxAmxRows];
  alignas(64) float panel_scratch_[kStripDepth * kMaxPanel];
};

}  // namespace

template <class Weight, class Rows, class Out>
PackedLinear<Weight, Rows, Out>::Tiling PackedLinear<Weight, Rows, Out>::tiling() const {
  // Of even height, so that threads with as many tiles have as much to do.
  const auto even_rows = [&](int64_t most) { return ceil_div(m, std::max<int64_t>(ceil_div(m, most), 1)); };
  if (!kIsWords<Weight> || !has_amx(isa)) return {even_rows(kMaxTileRows), kTilePanels};
  // A weight is read from memory once for every block, whose rows stay in L2 beside a panel and the next one. The more
  // panels in a tile, the more often the next one is known, and is on its way already.
  constexpr int64_t kBlockBytes = 5 << 18, kMaxPanels = 8, kTilesOfThread = 4;
  const int64_t most = std::clamp(kBlockBytes / (depth() * 4), kAmxSide, kMaxAmxRows);
  const int64_t rows = up_to_multiple(even_rows(most), kAmxSide);
  const int64_t panels = layout.panels() * ceil_div(m, std::max(rows, kAmxSide)) / (kTilesOfThread * threads);
  return {rows, std::clamp<int64_t>(panels, 1, kMaxPanels)};
}

template <class Weight, class Rows, class Out>
int64_t PackedLinear<Weight, Rows, Out>::tiles() const {
  const auto [rows, panels] = tiling();
  return m ? ceil_div(m, rows) * ceil_div(layout.panels(), panels) : 0;
}

template <class Weight, class Rows, class Out>
void PackedLinear<Weight, Rows, Out>::run(std::atomic<int64_t>& next_tile) const {
  Workspace<Weight, Rows, Out> workspace(*this);
  const int64_t end = tiles();
  for (int64_t tile; (tile = next_tile.fetch_add(1, std::memory_order_relaxed)) < end;) workspace.run(tile);
}

template struct PackedLinear<float>;
template struct PackedLinear<BFloat16>;
template struct PackedLinear<Float16>;
template struct PackedLinear<FourBytes>;
template struct PackedLinear<float, ByteRows>;
template struct PackedLinear<BFloat16Pair, const BFloat16*, BFloat16>;
template struct PackedLinear<BFloat16Pair, const BFloat16*, float>;

}  // namespace rtp_mm
