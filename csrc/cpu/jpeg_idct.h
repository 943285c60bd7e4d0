// The inverse DCT of libjpeg's "islow", of which every decoder makes the same bytes: by Loeffler, Ligtenberg and
// Moschytz (ICASSP 1989), in fixed point of 13 bits.

#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/jpeg_simd.h"

namespace rtp_mm {

// Four blocks side by side: coefficient (row, column) of block b stands at [32 * row + 8 * b + column].
constexpr int kQuadBlocks = 4, kQuadRow = 8 * kQuadBlocks, kQuadSize = 8 * kQuadRow;

struct alignas(64) Quad {
  int16_t at[kQuadSize];
};

struct alignas(64) QuadSteps {
  int16_t steps[kQuadSize];   // of quantisation
  int16_t limits[kQuadSize];  // of coefficients before they are multiplied by them
};

// No sum of absolute values of a column is larger in what a DCT makes of pixels, but for rounding; up to it all that
// comes about in between has 16 bits: 4 * 1.387 times this and rounding is less than 2^14, and sums of two are made.
constexpr int kMostInColumn = 2950;

namespace detail {

constexpr int kIdctBits = 13, kFirstPassBits = 2;

// a and b in turns, in two vectors, and sums of multiples of them.
template <class Arch>
struct ZippedRows {
  Shorts<Arch> low, high;

  RTP_MM_INLINE ZippedRows(Shorts<Arch> a, Shorts<Arch> b) : low(zip_low<Arch>(a, b)), high(zip_high<Arch>(a, b)) {}
};

template <class Arch>
struct IntRow {
  Ints<Arch> low, high;

  RTP_MM_INLINE IntRow operator+(const IntRow& other) const {
    return {add<Arch>(low, other.low), add<Arch>(high, other.high)};
  }
  RTP_MM_INLINE IntRow operator-(const IntRow& other) const {
    return {subtract<Arch>(low, other.low), subtract<Arch>(high, other.high)};
  }
};

template <class Arch>
RTP_MM_INLINE IntRow<Arch> combine(const ZippedRows<Arch>& rows, int a, int b) {
  const auto factors = reinterpret_cast<Shorts<Arch>>(
      Ints<Arch>{} + static_cast<int32_t>(static_cast<uint32_t>(b) << 16 | (a & 0xffff)));
  return {multiply_add_pairs<Arch>(rows.low, factors), multiply_add_pairs<Arch>(rows.high, factors)};
}

template <class Arch, int kShift>
RTP_MM_INLINE Shorts<Arch> shifted(const IntRow<Arch>& row) {
  return pack<Arch>(row.low >> kShift, row.high >> kShift);
}

// Of the columns of 8 rows. The last kShift bits are rounded away; kZero is added to what remains.
template <class Arch, int kShift, int kZero>
RTP_MM_INLINE void idct_columns(Shorts<Arch> (&rows)[8]) {
  const Ints<Arch> rest = Ints<Arch>{} + (1 << (kShift - 1)) + (kZero << kShift);
  const ZippedRows<Arch> of04(rows[0], rows[4]), of26(rows[2], rows[6]);
  const IntRow<Arch> offset{rest, rest};
  const IntRow<Arch> sum04 = combine(of04, 8192, 8192) + offset, difference04 = combine(of04, 8192, -8192) + offset;
  const IntRow<Arch> low26 = combine(of26, 10703, 4433), high26 = combine(of26, 4433, -10704);
  const IntRow<Arch> even0 = sum04 + low26, even3 = sum04 - low26;
  const IntRow<Arch> even1 = difference04 + high26, even2 = difference04 - high26;

  const ZippedRows<Arch> of71(rows[7], rows[1]), of53(rows[5], rows[3]);
  const ZippedRows<Arch> sums(add<Arch>(rows[7], rows[3]), add<Arch>(rows[5], rows[1]));
  const IntRow<Arch> sum73 = combine(sums, -6436, 9633), sum51 = combine(sums, 9633, 6437);
  const IntRow<Arch> odd3 = combine(of71, -4927, -7373) + sum73, odd0 = combine(of71, -7373, 4926) + sum51;
  const IntRow<Arch> odd2 = combine(of53, -4176, -20995) + sum51, odd1 = combine(of53, -20995, 4177) + sum73;

  rows[0] = shifted<Arch, kShift>(even0 + odd0);
  rows[7] = shifted<Arch, kShift>(even0 - odd0);
  rows[1] = shifted<Arch, kShift>(even1 + odd1);
  rows[6] = shifted<Arch, kShift>(even1 - odd1);
  rows[2] = shifted<Arch, kShift>(even2 + odd2);
  rows[5] = shifted<Arch, kShift>(even2 - odd2);
  rows[3] = shifted<Arch, kShift>(even3 + odd3);
  rows[4] = shifted<Arch, kShift>(even3 - odd3);
}

// Each block by itself.
template <class Arch>
RTP_MM_INLINE void transpose_blocks(Shorts<Arch> (&rows)[8]) {
  Ints<Arch> pairs[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = reinterpret_cast<Ints<Arch>>(zip_low<Arch>(rows[i], rows[i + 1]));
    pairs[i + 1] = reinterpret_cast<Ints<Arch>>(zip_high<Arch>(rows[i], rows[i + 1]));
  }
  Longs<Arch> fours[8];  // columns 2i and 2i + 1 of rows 0 to 3, then of rows 4 to 7
  for (int i = 0; i < 2; ++i) {
    fours[4 * i] = reinterpret_cast<Longs<Arch>>(zip_low<Arch>(pairs[4 * i], pairs[4 * i + 2]));
    fours[4 * i + 1] = reinterpret_cast<Longs<Arch>>(zip_high<Arch>(pairs[4 * i], pairs[4 * i + 2]));
    fours[4 * i + 2] = reinterpret_cast<Longs<Arch>>(zip_low<Arch>(pairs[4 * i + 1], pairs[4 * i + 3]));
    fours[4 * i + 3] = reinterpret_cast<Longs<Arch>>(zip_high<Arch>(pairs[4 * i + 1], pairs[4 * i + 3]));
  }
  for (int i = 0; i < 4; ++i) {
    rows[2 * i] = reinterpret_cast<Shorts<Arch>>(zip_low<Arch>(fours[i], fours[i + 4]));
    rows[2 * i + 1] = reinterpret_cast<Shorts<Arch>>(zip_high<Arch>(fours[i], fours[i + 4]));
  }
}

// 8 bytes of each block from each of two rows, to where they belong: [first row's blocks, second row's blocks].
template <class Arch>
RTP_MM_INLINE Longs<Arch> rows_apart(Longs<Arch> bytes) {
  if constexpr (sizeof(bytes) == 64) return __builtin_shufflevector(bytes, bytes, 0, 2, 4, 6, 1, 3, 5, 7);
  if constexpr (sizeof(bytes) == 32) return __builtin_shufflevector(bytes, bytes, 0, 2, 1, 3);
  return bytes;
}

}  // namespace detail

// Samples of four blocks, side by side, to rows `stride` bytes apart. Where an element of the answer is negative, a
// coefficient or a column of them is more than an encoder makes of pixels, and decoders differ.
template <class Arch>
RTP_MM_INLINE Shorts<Arch> idct_quad(const Quad& quad, const QuadSteps& steps, uint8_t* samples, int64_t stride) {
  using Vector = Shorts<Arch>;
  constexpr int kLanes = sizeof(Vector) / 2;
  Vector over{};
  for (int part = 0; part < kQuadRow; part += kLanes) {
    Vector rows[8], sum{};
    for (int i = 0; i < 8; ++i) {
      const int at = part + i * kQuadRow;
      const auto coefficients = *reinterpret_cast<const Vector*>(quad.at + at);
      over |= *reinterpret_cast<const Vector*>(steps.limits + at) - magnitude<Arch>(coefficients);
      rows[i] = multiply<Arch>(coefficients, *reinterpret_cast<const Vector*>(steps.steps + at));
      sum = add<Arch>(sum, magnitude<Arch>(rows[i]));
    }
    over |= subtract<Arch>(Vector{} + kMostInColumn, sum);
    detail::idct_columns<Arch, detail::kIdctBits - detail::kFirstPassBits, 0>(rows);
    detail::transpose_blocks<Arch>(rows);
    detail::idct_columns<Arch, detail::kIdctBits + detail::kFirstPassBits + 3, 128>(rows);
    detail::transpose_blocks<Arch>(rows);
    for (int i = 0; i < 8; i += 2) {
      const Longs<Arch> bytes = detail::rows_apart<Arch>(pack_bytes<Arch>(rows[i], rows[i + 1]));
      std::memcpy(samples + i * stride + part, &bytes, kLanes);
      std::memcpy(samples + (i + 1) * stride + part, reinterpret_cast<const uint8_t*>(&bytes) + kLanes, kLanes);
    }
  }
  return over;
}

}  // namespace rtp_mm
