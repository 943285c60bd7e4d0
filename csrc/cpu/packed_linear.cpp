#include "cpu/packed_linear.h"

#include <algorithm>
#include <type_traits>

#include "cpu/aligned.h"
#include "cpu/finish_sums.h"
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
constexpr int64_t kTileColumns = kTilePanels * kMaxPanel;  // at most; rows of a tile's sums are as far apart
// Where products are AMX's: words of a step of k, rows of a block whose k is one step or more, panels of a
// tile. In L2 stand a block's words of a step (1 MB, 640 KB), the sums where there are more steps (512 KB), and two
// panels of a step (160 KB each), one of them on its way from memory.
constexpr int64_t kMaxAmxDepth = 640, kMaxAmxRows = 384, kMaxAmxRowsInSteps = 256, kMaxAmxPanels = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Widen {
  template <class Arch, class Weight>
  RTP_MM_INLINE static void run(const Weight* weight, int64_t count, float* dst) {
    using Lanes = Wide<Arch, Weight>;
    for (int64_t i = 0; i < count; i += Lanes::kLanes) at<Lanes>(dst + i) = widened<Lanes>(weight + i);
  }
};

// x[rows, k] as [steps of k][rows][strip_depth].
void pack_strips(const float* x, int64_t x_stride, int64_t rows, int64_t k, int64_t strip_depth, float* strips) {
  for (int64_t begin = 0; begin < k; begin += strip_depth) {
    const int64_t depth = std::min(strip_depth, k - begin);
    for (int64_t r = 0; r < rows; ++r, strips += strip_depth) std::copy_n(x + r * x_stride + begin, depth, strips);
  }
}

// The same of pairs, with zeros up to the depth that is multiplied.
void pack_strips(const BFloat16* x, int64_t x_stride, int64_t rows, int64_t k, int64_t strip_depth,
                 BFloat16Pair* strips) {
  for (int64_t begin = 0; begin < k; begin += 2 * strip_depth) {
    const int64_t depth = std::min(2 * strip_depth, k - begin), padded = 2 * packed_depth<BFloat16Pair>(depth);
    for (int64_t r = 0; r < rows; ++r, strips += strip_depth) {
      auto* strip = reinterpret_cast<BFloat16*>(strips);
      std::fill(std::copy_n(x + r * x_stride + begin, depth, strip), strip + padded, BFloat16{});
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
        amx_depth_(up_to_multiple(ceil_div(words_, ceil_div(words_, kMaxAmxDepth)), kAmxSide)),
        strip_depth_(by_amx_ ? linear_row_stride(job.isa, 2 * words_) / 2 : kStripDepth),
        steps_(ceil_div(words_, by_amx_ ? amx_depth_ : kStripDepth)),
        panel_(job.layout.panel()),
        tiling_(job.tiling()),
        groups_(ceil_div(job.layout.panels(), tiling_.panels)),
        tiles_(job.tiles()),
        padded_rows_(up_to_multiple(tiling_.rows, kSquareRows)),
        sums_stride_(by_amx_ ? kMaxPanel : kTileColumns),
        sums_rows_(by_amx_ && steps_ == 1 ? 2 * kSquareRows : padded_rows_ * (by_amx_ ? tiling_.panels : 1)),
        strips_(tiling_.rows * (by_amx_ ? 1 : steps_) * strip_depth_),
        sums_(sums_rows_ * sums_stride_),
        amx_tiles_(by_amx_) {}

  void run(int64_t tile) {
    take_block(tile / groups_);
    const int64_t first = tile % groups_ * tiling_.panels, end = std::min(first + tiling_.panels, job_.layout.panels());
    take_columns(first, end);
    if constexpr (kIsWords<Weight>) {
      if (by_amx_) return multiply_by_amx(first, end, panel_after(tile));
    }
    multiply_by_steps(first, end);
    NoProduct nothing;
    finish({.data = sums_.data(), .row = 0, .rows = rows_, .panel = first, .panels = end - first}, &nothing);
  }

 private:
  // Packs its rows, unless it is there; but not those that AMX's tiles can read where they are: whole tiles of rows as
  // far apart as packed ones.
  void take_block(int64_t block) {
    if (block == block_) return;
    block_ = block;
    first_row_ = block * tiling_.rows;
    rows_ = std::min(tiling_.rows, job_.m - first_row_);
    rows_in_place_ = 0;
    if constexpr (std::is_same_v<Rows, ByteRows>) {
      centre_rows(job_.isa, job_.x + first_row_, rows_, job_.k, strips_.data());
    } else if constexpr (kIsBytes) {
      quantize_rows(job_.isa, rows_of_x(), rows_, job_.k, strip_depth_, strips_.data(), row_scales_);
    } else {
      if (by_amx_ && job_.k == 2 * words_ && job_.x_stride == 2 * strip_depth_) {
        rows_in_place_ = rows_ % kAmxSide == 0 ? rows_ : rows_ / kSquareRows * kSquareRows;
      }
      pack_strips(rows_of_x() + rows_in_place_ * job_.x_stride, job_.x_stride, rows_ - rows_in_place_, job_.k,
                  strip_depth_, strips_.data());
    }
  }

  // What finishing sums takes of the weight's rows that stand in the panels.
  void take_columns(int64_t first_panel, int64_t end_panel) {
    first_panel_ = first_panel;
    const int64_t width = job_.layout.columns();
    for (int64_t panel = first_panel, column = 0; panel < end_panel; ++panel) {
      const int64_t count = job_.layout.columns_of(panel);
      for (int64_t part = 0; part < job_.layout.parts; ++part, column += width) {
        const int64_t row = job_.layout.row(panel, part * width);
        const auto take = [&](const auto* of_rows, auto* of_columns, auto factor) {
          for (int64_t j = 0; j < width; ++j) of_columns[column + j] = j < count ? factor * of_rows[row + j] : 0;
        };
        take(job_.bias, bias_, 1.0f);
        if constexpr (kIsBytes) {
          take(job_.scales, scales_, 1.0f);
          take(job_.sums, offsets_, 128);
        }
      }
    }
  }

  // The first panel of the tile that this thread will probably take next, when the others have taken one each; -1 if it
  // will take none.
  int64_t panel_after(int64_t tile) const {
    return tile + job_.threads < tiles_ ? (tile + job_.threads) % groups_ * tiling_.panels : -1;
  }

  // Of that row of the block.
  const Word* left(int64_t row) const {
    if constexpr (std::is_same_v<Word, BFloat16Pair>) {
      if (row < rows_in_place_) return reinterpret_cast<const Word*>(rows_of_x()) + row * strip_depth_;
    }
    return strips_.data() + (row - rows_in_place_) * strip_depth_;
  }

  auto rows_of_x() const { return job_.x + first_row_ * job_.x_stride; }

  // Steps of k in turn, each for all of the panels: what they read and add to stays in L2.
  void multiply_by_steps(int64_t first_panel, int64_t end_panel) {
    for (int64_t step = 0; step < steps_; ++step) {
      const int64_t depth = std::min(kStripDepth, words_ - step * kStripDepth);
      for (int64_t panel = first_panel; panel < end_panel; ++panel) {
        const Weight* weight = job_.panels + (panel * words_ + step * kStripDepth) * panel_;
        const bool is_last = panel + 1 == end_panel;
        const Weight* next =
            is_last ? weight + (depth + (first_panel - panel) * words_) * panel_ : weight + words_ * panel_;
        multiply(job_.isa, strips_.data() + step * rows_ * kStripDepth,
                 {.rows = rows_,
                  .columns = panel_,
                  .depth = depth,
                  .panel = widened_panel(job_.isa, weight, depth * panel_, panel_scratch_),
                  .panel_stride = panel_,
                  .sums = reinterpret_cast<Sum<Word>*>(sums_.data()) + (panel - first_panel) * panel_,
                  .sums_stride = sums_stride_,
                  .is_added = step > 0},
                 {next, depth * panel_ * static_cast<int64_t>(sizeof(Weight))});
      }
    }
  }

  // A few rows at a time, whose sums are finished while the next ones' are made. AMX holds more sums than it can load
  // and store beside its products, so steps of k are long.
  void multiply_by_amx(int64_t first_panel, int64_t end_panel, int64_t next_panel) {
    const auto words_of = [&](int64_t panel, int64_t step) {
      return job_.panels + (panel * words_ + step * amx_depth_) * panel_;
    };
    Sums pending;
    for (int64_t step = 0, strip = 0; step < steps_; ++step) {
      const int64_t begin = step * amx_depth_, depth = std::min(amx_depth_, words_ - begin);
      const int64_t bytes = depth * panel_ * sizeof(Word);
      for (int64_t panel = first_panel; panel < end_panel; ++panel) {
        const bool is_last = panel + 1 == end_panel;
        const Word* next = nullptr;  // what is multiplied after this panel, of about as many words
        if (!is_last) {
          next = words_of(panel + 1, step);
        } else if (step + 1 < steps_) {
          next = words_of(first_panel, step + 1);
        } else if (next_panel >= 0) {
          next = words_of(next_panel, 0);
        }
        for (int64_t row = 0; row < rows_; row += kSquareRows, ++strip) {
          const int64_t rows = std::min(kSquareRows, rows_ - row);
          // Sums of one step are soon gone: two places do, in turn.
          const int64_t place = steps_ == 1 ? strip % 2 * kSquareRows : (panel - first_panel) * padded_rows_ + row;
          float* sums = sums_.data() + place * sums_stride_;
          AmxProduct<Word> product(
              left(row) + begin, strip_depth_,
              {.rows = rows,
               .columns = panel_,
               .depth = depth,
               .panel = words_of(panel, step),
               .panel_stride = panel_,
               .sums = reinterpret_cast<Sum<Word>*>(sums),
               .sums_stride = sums_stride_,
               .is_added = step > 0},
              next ? Ahead{reinterpret_cast<const char*>(next) + bytes * row / rows_, bytes * rows / rows_} : Ahead{});
          finish(pending, &product);
          pending = {.data = sums, .row = row, .rows = step + 1 == steps_ ? rows : 0, .panel = panel, .panels = 1};
        }
      }
    }
    NoProduct nothing;
    finish(pending, &nothing);
  }

  // What some panels make of a block's rows; nothing, where there are no rows.
  struct Sums {
    float* data;
    int64_t row, rows = 0, panel, panels;
  };

  // Brings them to where they belong in the output.
  template <class Beside>
  void finish(const Sums& sums, Beside* beside) {
    if (sums.rows == 0) return beside->finish();
    const int64_t first = sums.panel * job_.layout.columns(), begin = first % job_.block_width,
                  offset = (sums.panel - first_panel_) * panel_;
    rtp_mm::run<FinishSums<kIsBytes>>(
        job_.isa,
        PendingSums<Out>{
            .sums = sums.data,
            .sums_stride = sums_stride_,
            .rows = sums.rows,
            .panels = sums.panels,
            .panel = panel_,
            .factors = {.bias = bias_ + offset, .scales = scales_ + offset, .offsets = offsets_ + offset},
            .row_scales = row_scales_ + sums.row,
            .activation = job_.activation,
            .is_added = job_.is_added,
            .out = job_.out + (first / job_.block_width * job_.m + first_row_ + sums.row) * job_.out_stride + begin,
            .out_stride = job_.out_stride,
            .columns = std::min(sums.panels * job_.layout.columns(), job_.layout.width - first),
            .first_columns = job_.block_width - begin,
            .block_width = job_.block_width,
            .block_gap = job_.m * job_.out_stride - job_.block_width},
        beside);
  }

  static constexpr int64_t kSquareRows = 2 * kAmxSide;

  const Job& job_;
  const bool by_amx_;
  const int64_t words_, amx_depth_, strip_depth_, steps_, panel_;
  const typename Job::Tiling tiling_;
  const int64_t groups_, tiles_, padded_rows_, sums_stride_, sums_rows_;
  AlignedVector<Word> strips_;  // [steps of k][rows][strip_depth_]; of AMX [rows][strip_depth_]
  AlignedVector<float> sums_;   // [sums_rows_][sums_stride_]
  const AmxTiles amx_tiles_;
  int64_t block_ = -1, first_row_ = 0, rows_ = 0, rows_in_place_ = 0;
  float row_scales_[kMaxAmxRows];
  int64_t first_panel_ = 0;
  alignas(64) float bias_[kMaxAmxPanels * kMaxPanel], scales_[kMaxAmxPanels * kMaxPanel];
  alignas(64) int32_t offsets_[kMaxAmxPanels * kMaxPanel];
  alignas(64) float panel_scratch_[kStripDepth * kMaxPanel];
};

}  // namespace

template <class Weight, class Rows, class Out>
PackedLinear<Weight, Rows, Out>::Tiling PackedLinear<Weight, Rows, Out>::tiling() const {
  // Of even height, so that threads with as many tiles have as much to do.
  const auto even_rows = [&](int64_t most) { return ceil_div(m, std::max<int64_t>(ceil_div(m, most), 1)); };
  if (!kIsWords<Weight> || !has_amx(isa)) return {even_rows(kMaxTileRows), kTilePanels};
  // A weight is read from memory once for every block. The more panels in a tile, the more often the next one is known,
  // and is on its way already; in steps of k, the less often a block is read anew.
  const bool is_one_step = depth() <= kMaxAmxDepth;
  const int64_t rows = up_to_multiple(even_rows(is_one_step ? kMaxAmxRows : kMaxAmxRowsInSteps), kAmxSide),
                blocks = ceil_div(m, std::max(rows, kAmxSide)), tiles_of_thread = is_one_step ? 4 : 2;
  const int64_t most = std::clamp<int64_t>(layout.panels() * blocks / (tiles_of_thread * threads), 1, kMaxAmxPanels);
  // The most that a thread gets, in panels of a block.
  const auto share = [&](int64_t panels) {
    return ceil_div(ceil_div(layout.panels(), panels) * blocks, threads) * panels;
  };
  int64_t panels = most;
  for (int64_t fewer = most - 1; 2 * fewer > most; --fewer) {
    if (share(fewer) < share(panels)) panels = fewer;
  }
  return {rows, panels};
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
