// Chroma to luma's size, and YCbCr to RGB, as libjpeg does both ("fancy upsampling").

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/jpeg_simd.h"

namespace rtp_mm {

constexpr int64_t kVectorMargin = 32;  // samples past the end of a row that are read with it

// Rows of a component: in between two samples a quarter of the way from the nearer to the other, in both directions.
// `near` and `far` are rows of `width` samples, the same one where rows are not doubled; `is_lower`: `far` lies below.
struct ChromaRows {
  const uint8_t *near, *far;
  int64_t width;
  bool is_lower;
};

// Twice the width.
template <bool kDown>
RTP_MM_INLINE void upsample_across(const ChromaRows& chroma, uint16_t* sums, uint8_t* row) {
  constexpr int kScale = kDown ? 4 : 2, kEven = kDown ? 8 : 1, kOdd = kDown ? 7 : 2;
  const int64_t width = chroma.width;
  uint16_t* sum = sums + 1;
  for (int64_t x = 0; x < width; ++x) {
    sum[x] = static_cast<uint16_t>(kDown ? 3 * chroma.near[x] + chroma.far[x] : chroma.near[x]);
  }
  sum[-1] = sum[0];
  sum[width] = sum[width - 1];
  for (int64_t x = 0; x < width; ++x) {
    const auto even = static_cast<uint16_t>(static_cast<uint16_t>(3 * sum[x] + sum[x - 1] + kEven) >> kScale);
    const auto odd = static_cast<uint16_t>(static_cast<uint16_t>(3 * sum[x] + sum[x + 1] + kOdd) >> kScale);
    const auto pair = static_cast<uint16_t>(even | odd << 8);
    std::memcpy(row + 2 * x, &pair, 2);
  }
}

// Of the same width, between two rows.
RTP_MM_INLINE void upsample_down(const ChromaRows& chroma, uint8_t* row) {
  const int bias = chroma.is_lower ? 2 : 1;
  for (int64_t x = 0; x < chroma.width; ++x) {
    row[x] = static_cast<uint8_t>((3 * chroma.near[x] + chroma.far[x] + bias) >> 2);
  }
}

namespace detail {

#ifdef RTP_MM_X86_KERNELS
// Bytes [begin, begin + 16) of 8 pixels, whose channels are at `channels[c] + pixel` of 16 bytes, -1 for another's; for
// each 16 bytes of a vector.
template <class Arch>
struct PixelOrder {
  alignas(64) int8_t places[ShortVectors<Arch>::kBytes];

  constexpr PixelOrder(int begin, const int (&channels)[3]) : places() {
    for (int i = 0; i < ShortVectors<Arch>::kBytes; ++i) {
      const int byte = begin + i % 16, first = channels[byte % 3];
      places[i] = static_cast<int8_t>(byte >= 24 || first < 0 ? -1 : first + byte / 3);
    }
  }
};

template <class Arch>
RTP_MM_INLINE Longs<Arch> pick(Longs<Arch> bytes, const PixelOrder<Arch>& order) {
  Longs<Arch> result;
  asm("vpshufb %2, %1, %0" : "=v"(result) : "v"(bytes), "m"(order.places));
  return result;
}

// 8-byte pieces in a row, out of three of each 16 bytes: two of `low`, one of `high`.
template <class Arch, int kFirst>
RTP_MM_INLINE Longs<Arch> pieces(Longs<Arch> low, Longs<Arch> high) {
  constexpr int kCount = sizeof(low) / 8;
  constexpr auto place = [](int i) {
    const int piece = kFirst + i, group = piece / 3 % (kCount / 2);
    return piece % 3 == 2 ? kCount + 2 * group : 2 * group + piece % 3;
  };
  if constexpr (kCount == 4) {
    return __builtin_shufflevector(low, high, place(0), place(1), place(2), place(3));
  } else {
    return __builtin_shufflevector(low, high, place(0), place(1), place(2), place(3), place(4), place(5), place(6),
                                   place(7));
  }
}
#endif

// Values clamped to bytes, as many pixels as a vector has elements.
template <class Arch>
RTP_MM_INLINE void store_pixels(Shorts<Arch> red, Shorts<Arch> green, Shorts<Arch> blue, uint8_t* rgb) {
  constexpr int kPixels = sizeof(red) / 2;
#ifdef RTP_MM_X86_KERNELS
  if constexpr (Arch::kLanes > 4) {
    static constexpr PixelOrder<Arch> kLow(0, {0, 8, -1}), kLowBlue(0, {-1, -1, 0}), kHigh(16, {0, 8, -1}),
        kHighBlue(16, {-1, -1, 0});
    const Longs<Arch> red_green = pack_bytes<Arch>(red, green), blues = pack_bytes<Arch>(blue, blue);
    const Longs<Arch> low = pick<Arch>(red_green, kLow) | pick<Arch>(blues, kLowBlue);
    const Longs<Arch> high = pick<Arch>(red_green, kHigh) | pick<Arch>(blues, kHighBlue);
    const Longs<Arch> first = pieces<Arch, 0>(low, high), rest = pieces<Arch, kPixels / 4>(low, high);
    std::memcpy(rgb, &first, 2 * kPixels);
    std::memcpy(rgb + 2 * kPixels, &rest, kPixels);
    return;
  }
#endif
  alignas(16) uint8_t channels[3][2 * kPixels];
  const Longs<Arch> red_green = pack_bytes<Arch>(red, green), blues = pack_bytes<Arch>(blue, blue);
  std::memcpy(channels[0], &red_green, 2 * kPixels);
  std::memcpy(channels[1], &blues, 2 * kPixels);
  for (int i = 0; i < kPixels; ++i) {
    rgb[3 * i] = channels[0][i];
    rgb[3 * i + 1] = channels[0][kPixels + i];
    rgb[3 * i + 2] = channels[1][i];
  }
}

}  // namespace detail

// Writes whole vectors of pixels, up to 32 of them.
template <class Arch>
RTP_MM_INLINE void ycc_to_rgb(const uint8_t* luma, const uint8_t* cb, const uint8_t* cr, int64_t width, uint8_t* rgb) {
  using Vector = Shorts<Arch>;
  constexpr int kLanes = sizeof(Vector) / 2;
  typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
  for (int64_t x = 0; x < width; x += kLanes) {
    const Vector y = __builtin_convertvector(*reinterpret_cast<const Bytes*>(luma + x), Vector);
    const Vector blue = __builtin_convertvector(*reinterpret_cast<const Bytes*>(cb + x), Vector) - 128;
    const Vector red = __builtin_convertvector(*reinterpret_cast<const Bytes*>(cr + x), Vector) - 128;
    // 1.402, 1.772, 0.71414 and 0.34414 in 16 bits of fraction, less the whole numbers nearby.
    const Vector r = y + red + ((multiply_high<Arch>(red + red, Vector{} + 26345) + 1) >> 1);
    const Vector b = y + blue + blue + ((multiply_high<Arch>(blue + blue, Vector{} + -14942) + 1) >> 1);
    const auto factors =
        reinterpret_cast<Vector>(Ints<Arch>{} + static_cast<int32_t>(18734u << 16 | (-22554 & 0xffff)));
    const Ints<Arch> low = multiply_add_pairs<Arch>(zip_low<Arch>(blue, red), factors);
    const Ints<Arch> high = multiply_add_pairs<Arch>(zip_high<Arch>(blue, red), factors);
    const Vector g = y - red + pack<Arch>((low + 32768) >> 16, (high + 32768) >> 16);
    detail::store_pixels<Arch>(r, g, b, rgb + 3 * x);
  }
}

RTP_MM_INLINE void grey_to_rgb(const uint8_t* luma, int64_t width, uint8_t* rgb) {
  for (int64_t x = 0; x < width; ++x) rgb[3 * x] = rgb[3 * x + 1] = rgb[3 * x + 2] = luma[x];
}

}  // namespace rtp_mm
