// AVX-512 with VNNI: vpdpbusd multiplies four unsigned bytes by four signed ones. A coefficient of 24 bits is three
// signed bytes, high * 65536 + middle * 256 + low.

#ifdef __x86_64__

// GCC 12 takes its own intrinsics' _mm512_undefined_epi32() for a mistake of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include "cpu/resize_kernels.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define AVX512_INLINE AVX512 __attribute__((always_inline)) inline

namespace rtp_mm {
namespace {

QuadTaps encode(const int32_t* coefficients) {
  uint32_t words[3] = {};
  for (int byte = 0; byte < 4; ++byte) {
    int32_t rest = coefficients[byte];
    for (int limb = 0; limb < 3; ++limb) {
      const auto signed_byte = static_cast<int8_t>(rest);
      words[2 - limb] |= static_cast<uint32_t>(static_cast<uint8_t>(signed_byte)) << (8 * byte);
      rest = (rest - signed_byte) / 256;
    }
  }
  return {{static_cast<int32_t>(words[0]), static_cast<int32_t>(words[1]), static_cast<int32_t>(words[2]), 0}};
}

AVX512_INLINE __m512i load(const uint32_t* quads) { return _mm512_load_si512(quads); }

AVX512_INLINE __m512i broadcast(int32_t value) { return _mm512_set1_epi32(value); }

// The taps of one quad, and the rounding, which passes through both shifts of the sum of high bytes.
struct Multiplier {
  __m512i rounding, mask, high, middle, low;
};

AVX512_INLINE Multiplier multiplier(const OutputTaps& output, const QuadTaps& taps) {
  return {broadcast(1 << (kFractionBits - 1 - 16)), broadcast(static_cast<int32_t>(output.mask)),
          broadcast(taps.words[0]), broadcast(taps.words[1]), broadcast(taps.words[2])};
}

// The bytes of `first` where the mask is 1, those of `last` where it is 0.
AVX512_INLINE __m512i select(const Multiplier& m, const uint32_t* first, const uint32_t* last) {
  return _mm512_ternarylogic_epi32(load(first), m.mask, load(last), 0xe2);
}

// An output of one quad.
AVX512_INLINE __m512i multiply(const Multiplier& m, const uint32_t* first, const uint32_t* last) {
  const __m512i bytes = select(m, first, last);
  __m512i sum = _mm512_dpbusd_epi32(m.rounding, bytes, m.high);
  sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), bytes, m.middle);
  sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), bytes, m.low);
  return _mm512_srai_epi32(sum, kFractionBits);
}

// An output of kCount quads, or of any number if that is 0, in kVectors vectors; `quad(i, v)` points to vector v of its
// i-th quad. Unrolled for the usual counts it takes 7 to 14 % less of 4K to 1 megapixel.
template <int kVectors, int kCount, class Quad>
AVX512_INLINE void multiply_add(const OutputTaps& output, const QuadTaps* taps, Quad quad, __m512i* sums) {
  const int32_t count = kCount ? kCount : output.count;
  const Multiplier m = multiplier(output, taps[0]);
  const __m512i zero = _mm512_setzero_si512();
  __m512i high[kVectors], middle[kVectors], low[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const __m512i bytes = select(m, quad(0, v), quad(count, v));
    high[v] = _mm512_dpbusd_epi32(m.rounding, bytes, m.high);
    middle[v] = _mm512_dpbusd_epi32(zero, bytes, m.middle);
    low[v] = _mm512_dpbusd_epi32(zero, bytes, m.low);
  }
#pragma GCC unroll 4
  for (int32_t i = 1; i < count; ++i) {
    const __m512i high_taps = broadcast(taps[i].words[0]), middle_taps = broadcast(taps[i].words[1]),
                  low_taps = broadcast(taps[i].words[2]);
    for (int v = 0; v < kVectors; ++v) {
      const __m512i bytes = load(quad(i, v));
      high[v] = _mm512_dpbusd_epi32(high[v], bytes, high_taps);
      middle[v] = _mm512_dpbusd_epi32(middle[v], bytes, middle_taps);
      low[v] = _mm512_dpbusd_epi32(low[v], bytes, low_taps);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[v], 8), middle[v]);
    sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), low[v]);
    sums[v] = _mm512_srai_epi32(sum, kFractionBits);
  }
}

// Four vectors of dwords to bytes, clamped: each group of 16 holds those of its group in a, b, c and d.
AVX512_INLINE __m512i pack(__m512i a, __m512i b, __m512i c, __m512i d) {
  return _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
}

template <int64_t kPixelStride>
AVX512_INLINE void gather(const uint8_t* pixels, int64_t row_stride, int64_t quads, uint32_t* columns) {
  const __m512i channels =
      kPixelStride == 3 ? _mm512_broadcast_i32x4(_mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1))
                        : _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, -1, -1, -1, -1));
  for (int64_t quad = 0; quad < quads; ++quad, pixels += 4 * kPixelStride, columns += kChannels * 16) {
    __m512i rows[4];  // row r, 4 + r, 8 + r, 12 + r: four pixels each
    for (int r = 0; r < 4; ++r) {
      const uint8_t* row = pixels + r * row_stride;
      const auto four_pixels = [&](int64_t group) {
        return reinterpret_cast<const __m128i*>(row + 4 * group * row_stride);
      };
      __m512i v = _mm512_castsi128_si512(_mm_loadu_si128(four_pixels(0)));
      v = _mm512_inserti32x4(v, _mm_loadu_si128(four_pixels(1)), 1);
      v = _mm512_inserti32x4(v, _mm_loadu_si128(four_pixels(2)), 2);
      v = _mm512_inserti32x4(v, _mm_loadu_si128(four_pixels(3)), 3);
      rows[r] = _mm512_shuffle_epi8(v, channels);
    }
    const __m512i red_green01 = _mm512_unpacklo_epi32(rows[0], rows[1]),
                  red_green23 = _mm512_unpacklo_epi32(rows[2], rows[3]);
    const __m512i blue01 = _mm512_unpackhi_epi32(rows[0], rows[1]), blue23 = _mm512_unpackhi_epi32(rows[2], rows[3]);
    _mm512_store_si512(columns, _mm512_unpacklo_epi64(red_green01, red_green23));
    _mm512_store_si512(columns + 16, _mm512_unpackhi_epi64(red_green01, red_green23));
    _mm512_store_si512(columns + 32, _mm512_unpacklo_epi64(blue01, blue23));
  }
}

AVX512 void gather_columns(const uint8_t* pixels, int64_t row_stride, int64_t pixel_stride, int64_t quads,
                           uint32_t* columns) {
  if (pixel_stride == 3) {
    gather<3>(pixels, row_stride, quads, columns);
  } else {
    gather<4>(pixels, row_stride, quads, columns);
  }
}

// The three channels of one output column, 16 rows each; `columns` starts at the output's first quad.
AVX512_INLINE void column(const uint32_t* columns, const OutputTaps& output, const QuadTaps* taps, __m512i* sums) {
  constexpr int64_t kQuad = kChannels * 16;
  if (output.count == 1) {
    const Multiplier m = multiplier(output, *taps);
    for (int64_t channel = 0; channel < kChannels; ++channel) {
      const uint32_t* first = columns + 16 * channel;
      sums[channel] = multiply(m, first, first + kQuad);
    }
  } else {
    const auto quad = [&](int64_t i, int64_t channel) { return columns + i * kQuad + 16 * channel; };
    switch (output.count) {
      case 2:
        return multiply_add<kChannels, 2>(output, taps, quad, sums);
      case 3:
        return multiply_add<kChannels, 3>(output, taps, quad, sums);
      case 4:
        return multiply_add<kChannels, 4>(output, taps, quad, sums);
      default:
        return multiply_add<kChannels, 0>(output, taps, quad, sums);
    }
  }
}

AVX512 void horizontal(const uint32_t* columns, int64_t first, const OutputTaps* outputs, const QuadTaps* taps,
                       int64_t begin, int64_t end, QuadRows dst) {
  for (int64_t x = begin; x < end; x += 4) {
    __m512i sums[4][kChannels];
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      const OutputTaps& output = outputs[x + i];
      column(columns + (output.first - first) * kChannels * 16, output, taps + output.taps, sums[i]);
    }
    for (int64_t channel = 0; channel < kChannels; ++channel) {
      const __m512i bytes = pack(sums[0][channel], sums[1][channel], sums[2][channel], sums[3][channel]);
      uint32_t* place = dst.quads + quad_place(channel * dst.plane + x);
      const auto quad = [&](int64_t i) { return reinterpret_cast<__m128i*>(place + i * dst.stride); };
      _mm_store_si128(quad(0), _mm512_castsi512_si128(bytes));
      _mm_store_si128(quad(1), _mm512_extracti32x4_epi32(bytes, 1));
      _mm_store_si128(quad(2), _mm512_extracti32x4_epi32(bytes, 2));
      _mm_store_si128(quad(3), _mm512_extracti32x4_epi32(bytes, 3));
    }
  }
}

AVX512 void interleave(const uint8_t* rows, int64_t row_stride, int64_t blocks, uint32_t* quads) {
  for (int64_t block = 0; block < blocks; ++block, rows += kBlock, quads += kBlock) {
    const __m512i a = _mm512_loadu_si512(rows), b = _mm512_loadu_si512(rows + row_stride),
                  c = _mm512_loadu_si512(rows + 2 * row_stride), d = _mm512_loadu_si512(rows + 3 * row_stride);
    const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
    _mm512_store_si512(quads, _mm512_unpacklo_epi16(ab_low, cd_low));
    _mm512_store_si512(quads + 16, _mm512_unpackhi_epi16(ab_low, cd_low));
    _mm512_store_si512(quads + 32, _mm512_unpacklo_epi16(ab_high, cd_high));
    _mm512_store_si512(quads + 48, _mm512_unpackhi_epi16(ab_high, cd_high));
  }
}

AVX512 void vertical(const uint32_t* const* quads, const OutputTaps& output, const QuadTaps* all_taps, int64_t blocks,
                     uint8_t* row) {
  const QuadTaps* taps = all_taps + output.taps;
  const int64_t bytes = blocks * kBlock;
  __m512i sums[4];
  if (output.count == 1) {
    const Multiplier m = multiplier(output, *taps);
    const uint32_t *first = quads[0], *last = quads[1];
    for (int64_t i = 0; i < bytes; i += kBlock) {
      for (int64_t v = 0; v < 4; ++v) sums[v] = multiply(m, first + i + 16 * v, last + i + 16 * v);
      _mm512_store_si512(row + i, pack(sums[0], sums[1], sums[2], sums[3]));
    }
  } else {
    for (int64_t i = 0; i < bytes; i += kBlock) {
      const auto quad = [&](int64_t index, int64_t v) { return quads[index] + i + 16 * v; };
      multiply_add<4, 0>(output, taps, quad, sums);
      _mm512_store_si512(row + i, pack(sums[0], sums[1], sums[2], sums[3]));
    }
  }
}

AVX512 void separate(const uint32_t* quads, int64_t blocks, uint8_t* rows, int64_t row_stride) {
  const __m512i transpose = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int64_t block = 0; block < blocks; ++block, rows += kBlock, quads += kBlock) {
    __m512i v[4];  // in each group of 16: four bytes of row 0, of row 1, ...
    for (int i = 0; i < 4; ++i) v[i] = _mm512_shuffle_epi8(load(quads + 16 * i), transpose);
    const __m512i rows01_left = _mm512_unpacklo_epi32(v[0], v[1]), rows01_right = _mm512_unpacklo_epi32(v[2], v[3]);
    const __m512i rows23_left = _mm512_unpackhi_epi32(v[0], v[1]), rows23_right = _mm512_unpackhi_epi32(v[2], v[3]);
    _mm512_store_si512(rows, _mm512_unpacklo_epi64(rows01_left, rows01_right));
    _mm512_store_si512(rows + row_stride, _mm512_unpackhi_epi64(rows01_left, rows01_right));
    _mm512_store_si512(rows + 2 * row_stride, _mm512_unpacklo_epi64(rows23_left, rows23_right));
    _mm512_store_si512(rows + 3 * row_stride, _mm512_unpackhi_epi64(rows23_left, rows23_right));
  }
}

}  // namespace

const ResizeKernels kResizeAvx512Vnni = {encode, gather_columns, horizontal, interleave, vertical, separate};

}  // namespace rtp_mm

#endif
