#include "cpu/multiply.h"

#include <algorithm>

#include "cpu/simd.h"

namespace rtp_mm {
namespace {

// Strips: left[r][i] is left[r * kStripDepth + i]. Else left[i * stride + r].
template <bool kIsStrips>
struct Multiply {
  template <class Arch, int kRows, int kVectors>
  RTP_MM_INLINE static void block(const Product& p, const float* left, int64_t left_stride, int64_t column,
                                  float* sums, const char* ahead, int64_t ahead_step) {
    Vector<Arch> acc[kRows][kVectors] = {};
    const float* panel = p.panel + column;
    const int64_t depth = p.depth, panel_stride = p.panel_stride;
    for (int64_t i = 0; i < depth; ++i, panel += panel_stride, ahead += ahead_step) {
      if constexpr (kIsStrips) {
        __builtin_prefetch(left + kRows * kStripDepth + 16 * i);  // of the next strip, a line of 16 floats
        __builtin_prefetch(ahead, 0, 2);
      }
      Vector<Arch> b[kVectors];
      for (int v = 0; v < kVectors; ++v) b[v] = at<Arch>(panel + v * Arch::kLanes);
      for (int r = 0; r < kRows; ++r) {
        const float a = kIsStrips ? left[r * kStripDepth + i] : left[i * left_stride + r];
        for (int v = 0; v < kVectors; ++v) acc[r][v] += a * b[v];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        Vector<Arch>& sum = at<Arch>(sums + r * p.sums_stride + v * Arch::kLanes);
        sum = p.is_added ? sum + acc[r][v] : acc[r][v];
      }
    }
  }

  // A strip of `rows`, at most kRows of them.
  template <class Arch, int kRows, int kVectors>
  RTP_MM_INLINE static void strip(const Product& p, int64_t rows, const float* left, int64_t left_stride,
                                  int64_t column, float* sums, const char* ahead, int64_t ahead_step) {
    if (rows == kRows) {
      block<Arch, kRows, kVectors>(p, left, left_stride, column, sums, ahead, ahead_step);
    } else if constexpr (kRows > 1) {
      Multiply::strip<Arch, kRows - 1, kVectors>(p, rows, left, left_stride, column, sums, ahead, ahead_step);
    }
  }

  template <class Arch, int kRows, int kVectors>
  RTP_MM_INLINE static void columns(const Product& p, const float* left, int64_t left_stride, int64_t column,
                                    Ahead ahead) {
    // Strips of even height: 16 rows are twice 8, which is faster than 14 and 2.
    const int64_t count = (p.rows + kRows - 1) / kRows, height = (p.rows + count - 1) / count;
    const int64_t ahead_step = (ahead.bytes + count * p.depth - 1) / (count * p.depth);
    const char* next = ahead.data ? static_cast<const char*>(ahead.data) : reinterpret_cast<const char*>(left);
    for (int64_t r = 0; r < p.rows; r += height, next += ahead_step * p.depth) {
      strip<Arch, kRows, kVectors>(p, std::min(height, p.rows - r), left + r * (kIsStrips ? kStripDepth : 1),
                                   left_stride, column, p.sums + r * p.sums_stride + column, next, ahead_step);
    }
  }

  template <class Arch>
  RTP_MM_INLINE static void run(Product p, const float* left, int64_t left_stride, Ahead ahead) {
    // Three vectors and fewer rows do with fewer loads, but four vectors are two and two.
    int64_t column = 0;
    for (int64_t vectors; (vectors = (p.columns - column) / Arch::kLanes) > 0;) {
      if (vectors == 3 || vectors > 4) {
        columns<Arch, Arch::kRows * 2 / 3, 3>(p, left, left_stride, column, ahead);
        column += 3 * Arch::kLanes;
      } else if (vectors > 1) {
        columns<Arch, Arch::kRows, 2>(p, left, left_stride, column, ahead);
        column += 2 * Arch::kLanes;
      } else {
        columns<Arch, Arch::kRows, 1>(p, left, left_stride, column, ahead);
        column += Arch::kLanes;
      }
    }
  }
};

}  // namespace

void multiply(Isa isa, const float* left, const Product& product, Ahead ahead) {
  run<Multiply<true>>(isa, product, left, kStripDepth, ahead);
}

void multiply_transposed(Isa isa, const float* left, int64_t left_stride, const Product& product) {
  run<Multiply<false>>(isa, product, left, left_stride, Ahead{});
}

}  // namespace rtp_mm
