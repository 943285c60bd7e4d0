#include "cpu/linear_panels.h"

#include <algorithm>

#include "cpu/float_formats.h"

namespace rtp_mm {
namespace {

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

template void pack_linear_panel(const float*, const PanelLayout&, int64_t, int64_t, float*);
template void pack_linear_panel(const BFloat16*, const PanelLayout&, int64_t, int64_t, BFloat16*);
template void pack_linear_panel(const Float16*, const PanelLayout&, int64_t, int64_t, Float16*);
template void pack_linear_panel(const FourBytes*, const PanelLayout&, int64_t, int64_t, FourBytes*);
template void pack_linear_panel(const BFloat16Pair*, const PanelLayout&, int64_t, int64_t, BFloat16Pair*);

}  // namespace rtp_mm
