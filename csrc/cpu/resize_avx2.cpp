// AVX2: vpmaddwd multiplies pairs of 16-bit words. A coefficient is high * 4096 + low, the bytes of a quad are split
// into the even and the odd ones.

#ifdef __x86_64__

#include <immintrin.h>

#include "cpu/resize_kernels.h"

#define AVX2 __attribute__((target("avx2,prfchw")))
#define AVX2_INLINE AVX2 __attribute__((always_inline)) inline

namespace rtp_mm {
namespace {

constexpr int kLowBits = 12;

QuadTaps encode(const int32_t* coefficients) {
  const auto pair = [](int32_t first, int32_t second) {
    return static_cast<int32_t>((static_cast<uint32_t>(first) & 0xffff) | static_cast<uint32_t>(second) << 16);
  };
  const auto high = [&](int byte) { return coefficients[byte] >> kLowBits; };
  const auto low = [&](int byte) { return coefficients[byte] & ((1 << kLowBits) - 1); };
  return {{pair(high(0), high(2)), pair(high(1), high(3)), pair(low(0), low(2)), pair(low(1), low(3))}};
}

AVX2_INLINE __m256i load(const uint32_t* quads) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(quads)); }

AVX2_INLINE void store(void* dst, __m256i v) { _mm256_store_si256(static_cast<__m256i*>(dst), v); }

// The products of four bytes in each lane with the taps' high and low parts.
struct Products {
  __m256i high, low;
};

AVX2_INLINE Products multiply(__m256i bytes, const QuadTaps& taps) {
  const __m256i even = _mm256_and_si256(bytes, _mm256_set1_epi32(0x00ff00ff)), odd = _mm256_srli_epi16(bytes, 8);
  const auto& [high02, high13, low02, low13] = taps.words;
  return {_mm256_add_epi32(_mm256_madd_epi16(even, _mm256_set1_epi32(high02)),
                           _mm256_madd_epi16(odd, _mm256_set1_epi32(high13))),
          _mm256_add_epi32(_mm256_madd_epi16(even, _mm256_set1_epi32(low02)),
                           _mm256_madd_epi16(odd, _mm256_set1_epi32(low13)))};
}

// Eight lanes of one output in kVectors vectors; `quad(i, v)` points to vector v of its i-th quad.
template <int kVectors, class Quad>
AVX2_INLINE void dot(const OutputTaps& output, const QuadTaps* all_taps, Quad quad, __m256i* sums) {
  const QuadTaps* taps = all_taps + output.taps;
  const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(output.mask));
  Products totals[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    totals[v] = multiply(_mm256_blendv_epi8(load(quad(output.count, v)), load(quad(0, v)), mask), taps[0]);
  }
  for (int32_t i = 1; i < output.count; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      const Products products = multiply(load(quad(i, v)), taps[i]);
      totals[v].high = _mm256_add_epi32(totals[v].high, products.high);
      totals[v].low = _mm256_add_epi32(totals[v].low, products.low);
    }
  }
  const __m256i rounding = _mm256_set1_epi32(1 << (kFractionBits - 1));
  for (int v = 0; v < kVectors; ++v) {
    const __m256i low = _mm256_add_epi32(totals[v].low, rounding);
    sums[v] = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(totals[v].high, kLowBits), low), kFractionBits);
  }
}

// Four vectors of dwords to bytes, clamped: each group of 16 holds those of its group in a, b, c and d.
AVX2_INLINE __m256i pack(__m256i a, __m256i b, __m256i c, __m256i d) {
  return _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
}

template <int64_t kPixelStride>
AVX2_INLINE void gather(const uint8_t* pixels, int64_t row_stride, int64_t quads, uint32_t* columns) {
  const __m256i channels =
      kPixelStride == 3
          ? _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1))
          : _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, -1, -1, -1, -1));
  for (int64_t quad = 0; quad < quads; ++quad, pixels += 4 * kPixelStride, columns += kChannels * 16) {
    for (int half = 0; half < 2; ++half) {
      __m256i rows[4];  // row r and 4 + r of the half: four pixels each
      for (int r = 0; r < 4; ++r) {
        const uint8_t* row = pixels + (8 * half + r) * row_stride;
        const __m128i upper = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
        const __m128i lower = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 4 * row_stride));
        rows[r] = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(upper), lower, 1), channels);
      }
      const __m256i red_green01 = _mm256_unpacklo_epi32(rows[0], rows[1]),
                    red_green23 = _mm256_unpacklo_epi32(rows[2], rows[3]);
      const __m256i blue01 = _mm256_unpackhi_epi32(rows[0], rows[1]), blue23 = _mm256_unpackhi_epi32(rows[2], rows[3]);
      store(columns + 8 * half, _mm256_unpacklo_epi64(red_green01, red_green23));
      store(columns + 8 * half + 16, _mm256_unpackhi_epi64(red_green01, red_green23));
      store(columns + 8 * half + 32, _mm256_unpacklo_epi64(blue01, blue23));
    }
  }
}

AVX2 void gather_columns(const uint8_t* pixels, int64_t row_stride, int64_t pixel_stride, int64_t quads,
                         uint32_t* columns) {
  if (pixel_stride == 3) {
    gather<3>(pixels, row_stride, quads, columns);
  } else {
    gather<4>(pixels, row_stride, quads, columns);
  }
}

AVX2 void horizontal(const uint32_t* columns, int64_t first, const OutputTaps* outputs, const QuadTaps* taps,
                     int64_t begin, int64_t end, QuadRows dst, Ahead& ahead) {
  for (int64_t x = begin; x < end; x += 4) {
    ahead.step();
    for (int64_t half = 0; half < 2; ++half) {
      __m256i sums[4][kChannels];
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {
        const uint32_t* start = columns + (outputs[x + i].first - first) * kChannels * 16 + 8 * half;
        dot<kChannels>(
            outputs[x + i], taps,
            [&](int64_t quad, int64_t channel) { return start + (quad * kChannels + channel) * 16; }, sums[i]);
      }
      for (int64_t channel = 0; channel < kChannels; ++channel) {
        const __m256i bytes = pack(sums[0][channel], sums[1][channel], sums[2][channel], sums[3][channel]);
        uint32_t* place = dst.quads + quad_place(channel * dst.plane + x) + 2 * half * dst.stride;
        _mm_store_si128(reinterpret_cast<__m128i*>(place), _mm256_castsi256_si128(bytes));
        _mm_store_si128(reinterpret_cast<__m128i*>(place + dst.stride), _mm256_extracti128_si256(bytes, 1));
      }
    }
  }
}

AVX2 void interleave(const uint8_t* rows, int64_t row_stride, int64_t blocks, uint32_t* quads) {
  for (int64_t block = 0; block < blocks; ++block, quads += kBlock) {
    for (int64_t half = 0; half < 2; ++half, rows += kBlock / 2) {
      const auto row = [&](int64_t i) { return reinterpret_cast<const __m256i*>(rows + i * row_stride); };
      const __m256i a = _mm256_loadu_si256(row(0)), b = _mm256_loadu_si256(row(1)), c = _mm256_loadu_si256(row(2)),
                    d = _mm256_loadu_si256(row(3));
      const __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
      const __m256i cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
      uint32_t* place = quads + 8 * half;
      store(place, _mm256_unpacklo_epi16(ab_low, cd_low));
      store(place + 16, _mm256_unpackhi_epi16(ab_low, cd_low));
      store(place + 32, _mm256_unpacklo_epi16(ab_high, cd_high));
      store(place + 48, _mm256_unpackhi_epi16(ab_high, cd_high));
    }
  }
}

AVX2 void vertical(const uint32_t* const* quads, const OutputTaps& output, const QuadTaps* taps, int64_t blocks,
                   uint8_t* row, Ahead& ahead) {
  for (int64_t block = 0; block < blocks; ++block) {
    ahead.step();
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t place = block * kBlock + 8 * half;
      __m256i sums[4];
      dot<4>(output, taps, [&](int64_t quad, int64_t vector) { return quads[quad] + place + 16 * vector; }, sums);
      store(row + block * kBlock + 32 * half, pack(sums[0], sums[1], sums[2], sums[3]));
    }
  }
}

AVX2 void separate(const uint32_t* quads, int64_t blocks, uint8_t* rows, int64_t row_stride) {
  const __m256i transpose =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int64_t block = 0; block < blocks; ++block, quads += kBlock) {
    for (int64_t half = 0; half < 2; ++half, rows += kBlock / 2) {
      __m256i v[4];  // in each group of 16: four bytes of row 0, of row 1, ...
      for (int i = 0; i < 4; ++i) v[i] = _mm256_shuffle_epi8(load(quads + 8 * half + 16 * i), transpose);
      const __m256i rows01_left = _mm256_unpacklo_epi32(v[0], v[1]), rows01_right = _mm256_unpacklo_epi32(v[2], v[3]);
      const __m256i rows23_left = _mm256_unpackhi_epi32(v[0], v[1]), rows23_right = _mm256_unpackhi_epi32(v[2], v[3]);
      store(rows, _mm256_unpacklo_epi64(rows01_left, rows01_right));
      store(rows + row_stride, _mm256_unpackhi_epi64(rows01_left, rows01_right));
      store(rows + 2 * row_stride, _mm256_unpacklo_epi64(rows23_left, rows23_right));
      store(rows + 3 * row_stride, _mm256_unpackhi_epi64(rows23_left, rows23_right));
    }
  }
}

}  // namespace

const ResizeKernels kResizeAvx2 = {encode,     gather_columns, horizontal, nullptr,
                                   interleave, vertical,       separate,   cut_patches};

}  // namespace rtp_mm

#endif
