#include "cpu/centre_rows.h"

#include <algorithm>

#include "cpu/multiply.h"
#include "cpu/simd.h"

namespace rtp_mm {
namespace {

struct CentreRows {
  template <class Lanes>
  RTP_MM_INLINE static void centre(const uint8_t* bytes, int64_t count, float* dst) {
    if (count < Lanes::kLanes) {
      for (int64_t i = 0; i < count; ++i) dst[i] = static_cast<float>(bytes[i] - 128);
      return;
    }
    const int64_t last = count - Lanes::kLanes;  // where a vector begins that ends with the row, over the one before
    for (int64_t i = 0; i < last; i += Lanes::kLanes) at<Lanes>(dst + i) = widened<Lanes>(bytes + i) - 128.0f;
    at<Lanes>(dst + last) = widened<Lanes>(bytes + last) - 128.0f;
  }

  template <class Arch>
  RTP_MM_INLINE static void run(ByteRows rows, int64_t count, int64_t k, float* strips) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t begin = 0; begin < k; begin += kStripDepth) {
        centre<Wide<Arch, uint8_t>>(rows[r] + begin, std::min(kStripDepth, k - begin),
                                    strips + begin * count + r * kStripDepth);
      }
    }
  }
};

}  // namespace

void centre_rows(Isa isa, ByteRows rows, int64_t count, int64_t k, float* strips) {
  run<CentreRows>(isa, rows, count, k, strips);
}

}  // namespace rtp_mm
