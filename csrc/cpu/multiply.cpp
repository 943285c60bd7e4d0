#include "cpu/multiply.h"

#include "cpu/simd.h"

namespace rtp_mm {
namespace {

struct Multiply {
  template <class Arch, int kRows, int kVectors>
  RTP_MM_INLINE static void block(int64_t depth, const float* strip, const float* panel, int64_t panel_stride,
                                  float* sums, int64_t sums_stride) {
    Vector<Arch> acc[kRows][kVectors] = {};
    for (int64_t i = 0; i < depth; ++i, panel += panel_stride) {
      __builtin_prefetch(strip + kRows * kStripDepth + 16 * i);  // of the next strip, a line of 16 floats
      Vector<Arch> b[kVectors];
      for (int v = 0; v < kVectors; ++v) b[v] = at<Arch>(panel + v * Arch::kLanes);
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) acc[r][v] += strip[r * kStripDepth + i] * b[v];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) at<Arch>(sums + r * sums_stride + v * Arch::kLanes) += acc[r][v];
    }
  }

  template <class Arch, int kRows>
  RTP_MM_INLINE static void strip(int64_t rows, int64_t columns, int64_t depth, const float* strip, const float* panel,
                                  int64_t panel_stride, float* sums, int64_t sums_stride) {
    if (rows == kRows) {
      int64_t column = 0;
      for (; column + 2 * Arch::kLanes <= columns; column += 2 * Arch::kLanes) {
        block<Arch, kRows, 2>(depth, strip, panel + column, panel_stride, sums + column, sums_stride);
      }
      if (column < columns) {
        block<Arch, kRows, 1>(depth, strip, panel + column, panel_stride, sums + column, sums_stride);
      }
    } else if constexpr (kRows > 1) {
      Multiply::strip<Arch, kRows - 1>(rows, columns, depth, strip, panel, panel_stride, sums, sums_stride);
    }
  }

  template <class Arch>
  RTP_MM_INLINE static void run(int64_t rows, int64_t columns, int64_t depth, const float* strips, const float* panel,
                                int64_t panel_stride, float* sums, int64_t sums_stride) {
    // Strips of even height: 16 rows are twice 8, which is faster than 14 and 2.
    const int64_t count = (rows + Arch::kRows - 1) / Arch::kRows, height = (rows + count - 1) / count;
    for (int64_t r = 0; r < rows; r += height) {
      strip<Arch, Arch::kRows>(rows - r < height ? rows - r : height, columns, depth, strips + r * kStripDepth, panel,
                               panel_stride, sums + r * sums_stride, sums_stride);
    }
  }
};

}  // namespace

void multiply(Isa isa, int64_t rows, int64_t columns, int64_t depth, const float* strips, const float* panel,
              int64_t panel_stride, float* sums, int64_t sums_stride) {
  run<Multiply>(isa, rows, columns, depth, strips, panel, panel_stride, sums, sums_stride);
}

}  // namespace rtp_mm
