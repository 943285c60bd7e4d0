#include "cpu/multiply.h"

#include <algorithm>
#include <type_traits>

#include "cpu/simd.h"

namespace rtp_mm {
namespace {

// Element i of row r is left[r * kStripDepth + i], or, transposed, left[i * stride + r].
template <class Word, bool kIsTransposed>
struct Multiply {
  static constexpr bool kMultipliesBytes = std::is_same_v<Word, FourBytes>;
  static constexpr bool kMultipliesPairs = std::is_same_v<Word, BFloat16Pair>;

  // Accumulators, a row of the panel and one element of the left operand fill the registers. Where pairs are multiplied
  // without the instruction, speed does not matter, and compile time does.
  template <class Arch>
  static constexpr int max_rows(int vectors) {
    const int most = kMultipliesPairs && !Arch::kMultipliesPairs ? 2 : 14;
    return std::min((Arch::kRegisters - 1 - vectors) / vectors, most);
  }

  template <class Arch, int kRows, int kVectors>
  RTP_MM_INLINE static void block(const Product<Word>& p, const Word* left, int64_t stride, int64_t column,
                                  Sum<Word>* sums, const char* ahead, int64_t ahead_step) {
    Vector<Arch, Sum<Word>> acc[kRows][kVectors] = {};
    const Word* panel = p.panel + column;
    const int64_t depth = p.depth, panel_stride = p.panel_stride;
    for (int64_t i = 0; i < depth; ++i, panel += panel_stride) {
      if constexpr (!kIsTransposed) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += ahead_step;
      }
      Vector<Arch, Word> b[kVectors];
      for (int v = 0; v < kVectors; ++v) b[v] = at<Arch>(panel + v * Arch::kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Word a = kIsTransposed ? left[i * stride + r] : left[r * kStripDepth + i];
        for (int v = 0; v < kVectors; ++v) multiply_add<Arch>(acc[r][v], a, b[v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        Vector<Arch, Sum<Word>>& sum = at<Arch>(sums + r * p.sums_stride + v * Arch::kLanes);
        sum = p.is_added ? sum + acc[r][v] : acc[r][v];
      }
    }
  }

  // A strip of `rows`, at most kRows of them.
  template <class Arch, int kRows, int kVectors>
  RTP_MM_INLINE static void strip(const Product<Word>& p, int64_t rows, const Word* left, int64_t stride,
                                  int64_t column, Sum<Word>* sums, const char* ahead, int64_t ahead_step) {
    if (rows == kRows) {
      block<Arch, kRows, kVectors>(p, left, stride, column, sums, ahead, ahead_step);
    } else if constexpr (kRows > 1) {
      Multiply::strip<Arch, kRows - 1, kVectors>(p, rows, left, stride, column, sums, ahead, ahead_step);
    }
  }

  // As many columns from `column` on as kVectors hold, then the rest.
  template <class Arch, int kVectors>
  RTP_MM_INLINE static void columns(const Product<Word>& p, const Word* left, int64_t stride, int64_t column,
                                    Ahead ahead) {
    // Strips of even height: 16 rows are twice 8, which is faster than 14 and 2.
    constexpr int kRows = max_rows<Arch>(kVectors);
    const int64_t count = (p.rows + kRows - 1) / kRows, height = (p.rows + count - 1) / count;
    const int64_t ahead_step = (ahead.bytes + count * p.depth - 1) / (count * p.depth);
    for (; column + kVectors * Arch::kLanes <= p.columns; column += kVectors * Arch::kLanes) {
      const char* next = ahead.data ? static_cast<const char*>(ahead.data) : reinterpret_cast<const char*>(left);
      for (int64_t r = 0; r < p.rows; r += height, next += ahead_step * p.depth) {
        strip<Arch, kRows, kVectors>(p, std::min(height, p.rows - r), left + r * (kIsTransposed ? 1 : kStripDepth),
                                     stride, column, p.sums + r * p.sums_stride + column, next, ahead_step);
      }
    }
    if constexpr (kVectors * Arch::kLanes > kColumnUnit) columns<Arch, kVectors / 2>(p, left, stride, column, ahead);
  }

  template <class Arch>
  RTP_MM_INLINE static void run(Product<Word> p, const Word* left, int64_t stride, Ahead ahead) {
    columns<Arch, Arch::kVectors>(p, left, stride, 0, ahead);
  }
};

}  // namespace

void multiply(Isa isa, const float* left, const Product<float>& product, Ahead ahead) {
  run<Multiply<float, false>>(isa, product, left, kStripDepth, ahead);
}

void multiply(Isa isa, const FourBytes* left, const Product<FourBytes>& product, Ahead ahead) {
  run<Multiply<FourBytes, false>>(isa, product, left, kStripDepth, ahead);
}

void multiply(Isa isa, const BFloat16Pair* left, const Product<BFloat16Pair>& product, Ahead ahead) {
  run<Multiply<BFloat16Pair, false>>(isa, product, left, kStripDepth, ahead);
}

void multiply_transposed(Isa isa, const float* left, int64_t left_stride, const Product<float>& product) {
  run<Multiply<float, true>>(isa, product, left, left_stride, Ahead{});
}

void multiply_transposed(Isa isa, const BFloat16Pair* left, int64_t left_stride, const Product<BFloat16Pair>& product) {
  run<Multiply<BFloat16Pair, true>>(isa, product, left, left_stride, Ahead{});
}

}  // namespace rtp_mm
