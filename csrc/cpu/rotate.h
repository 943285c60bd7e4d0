// The rotary embedding's rotation, in vectors.

#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace rtp_mm {

// Rows of dst = scale * the rotated rows of src, which may be the same. Dimension i is turned together with
// i + dim / 2, in float32; cos, sin: [rows][dim / 2].
struct Rotate {
  template <class Arch>
  struct Eight : Arch {
    static constexpr int kLanes = 8;
  };

  // Every whole vector of a row's halves from i on; returns where they end.
  template <class Lanes, class Element>
  RTP_MM_INLINE static int64_t vectors_from(int64_t i, const Element* src, const float* cos, const float* sin,
                                            int64_t half, float scale, Element* dst) {
    for (; i + Lanes::kLanes <= half; i += Lanes::kLanes) {
      const Vector<Lanes> x = widened<Lanes>(src + i), y = widened<Lanes>(src + half + i);
      const Vector<Lanes> c = scale * at<Lanes>(cos + i), s = scale * at<Lanes>(sin + i);
      narrow<Lanes>(x * c - y * s, dst + i);
      narrow<Lanes>(y * c + x * s, dst + half + i);
    }
    return i;
  }

  template <class Arch, class Element>
  RTP_MM_INLINE static void run(const Element* src, int64_t src_stride, const float* cos, const float* sin,
                                int64_t rows, int64_t dim, float scale, Element* dst, int64_t dst_stride) {
    const int64_t half = dim / 2;
    for (; rows > 0; --rows, src += src_stride, dst += dst_stride, cos += half, sin += half) {
      if (rows > kRowsReadAhead) prefetch(src + kRowsReadAhead * src_stride, dim);
      int64_t i = vectors_from<Wide<Arch, Element>>(0, src, cos, sin, half, scale, dst);
      i = vectors_from<Eight<Arch>>(i, src, cos, sin, half, scale, dst);  // half of 80 is 16 + 16 + 8
      for (; i < half; ++i) {
        const float x = widened(src[i]), y = widened(src[half + i]), c = scale * cos[i], s = scale * sin[i];
        narrow(x * c - y * s, dst + i);
        narrow(y * c + x * s, dst + half + i);
      }
    }
  }
};

}  // namespace rtp_mm
