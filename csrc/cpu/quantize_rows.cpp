#include "cpu/quantize_rows.h"

#include <algorithm>
#include <bit>

#include "cpu/simd.h"

namespace rtp_mm {
namespace {

constexpr int64_t kBytes = sizeof(FourBytes);
// 1.5 * 2^23 leaves no fraction bits, so the sum rounds to an integer, ties to even, whose low byte is the sum's
// lowest.
constexpr float kToByte = 12582912.0f + 128.0f;
constexpr float kSmallest = 1e-30f;  // of the largest magnitudes: its reciprocal is far from infinity

struct QuantizeRows {
  // The largest of x's magnitudes; NaN, whose bits are higher than infinity's, if there is one.
  template <class Arch>
  RTP_MM_INLINE static float largest(const float* x, int64_t k) {
    IntVector<Arch> largest = {};
    int64_t i = 0;
    for (; i + Arch::kLanes <= k; i += Arch::kLanes) {
      const IntVector<Arch> bits = reinterpret_cast<IntVector<Arch>>(at<Arch>(x + i)) & 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    int32_t result = 0;
    for (int lane = 0; lane < Arch::kLanes; ++lane) result = std::max<int32_t>(result, largest[lane]);
    for (; i < k; ++i) result = std::max(result, std::bit_cast<int32_t>(x[i]) & 0x7fffffff);
    return std::bit_cast<float>(result);
  }

  template <class Lanes>
  RTP_MM_INLINE static void quantize(const float* x, int64_t count, float factor, uint8_t* dst) {
    int64_t i = 0;
    for (; i + Lanes::kLanes <= count; i += Lanes::kLanes) {
      const Vector<Lanes> shifted = at<Lanes>(x + i) * factor + kToByte;
      using Types = Simd<Lanes::kLanes>;
      const auto halves = __builtin_convertvector(reinterpret_cast<IntVector<Lanes>>(shifted), typename Types::Half);
      *reinterpret_cast<typename Types::Byte*>(dst + i) = __builtin_convertvector(halves, typename Types::Byte);
    }
    for (; i < count; ++i) dst[i] = static_cast<uint8_t>(std::bit_cast<uint32_t>(x[i] * factor + kToByte));
    for (const int64_t end = up_to_multiple(i, kBytes * kAmxSide); i < end; ++i) dst[i] = 128;
  }

  template <class Arch>
  RTP_MM_INLINE static void run(const float* x, int64_t rows, int64_t k, int64_t strip_bytes, uint8_t* strips,
                                float* scales) {
    for (int64_t r = 0; r < rows; ++r, x += k) {
      const float top = largest<Arch>(x, k), bounded = top < kSmallest ? kSmallest : top;
      scales[r] = bounded / 127;
      for (int64_t begin = 0; begin < k; begin += strip_bytes) {
        quantize<Wide<Arch, uint8_t>>(x + begin, std::min(strip_bytes, k - begin), 127 / bounded,
                                      strips + begin * rows + r * strip_bytes);
      }
    }
  }
};

}  // namespace

void quantize_rows(Isa isa, const float* x, int64_t rows, int64_t k, int64_t strip_depth, FourBytes* strips,
                   float* scales) {
  run<QuantizeRows>(isa, x, rows, k, strip_depth * kBytes, reinterpret_cast<uint8_t*>(strips), scales);
}

}  // namespace rtp_mm
