// AVX-512 with VNNI and VBMI: vpermb finds the taps of 16 columns in a row as it lies in memory.

#ifdef __x86_64__

#include "cpu/resize_avx512.h"

#define VBMI __attribute__((target(AVX512_TARGETS ",avx512vbmi")))
#define VBMI_INLINE VBMI __attribute__((always_inline)) inline

namespace rtp_mm {
namespace {

constexpr int64_t kRows = 4;  // of a quad

AVX512_INLINE __m512i load(const void* aligned) { return _mm512_load_si512(aligned); }

// The upper 16 bits of the sums of four rows, `pixels` and below, with 16 columns in the lanes of each.
VBMI_INLINE void multiply(const uint8_t* pixels, int64_t row_stride, __m512i places, const BlockTaps& taps,
                          __m512i* sums) {
  const __m512i high = load(taps.words[0]), middle = load(taps.words[1]), low = load(taps.words[2]);
  __m512i bytes[kRows];
  for (int64_t row = 0; row < kRows; ++row) {
    bytes[row] = _mm512_permutexvar_epi8(places, _mm512_loadu_si512(pixels + row * row_stride));
  }
  for (int r = 0; r < kRows; ++r) sums[r] = _mm512_dpbusd_epi32(broadcast(1 << (kFractionBits - 1)), bytes[r], low);
  for (int r = 0; r < kRows; ++r) sums[r] = _mm512_srai_epi32(sums[r], 8);
  for (int r = 0; r < kRows; ++r) sums[r] = _mm512_dpbusd_epi32(sums[r], bytes[r], middle);
  for (int r = 0; r < kRows; ++r) sums[r] = _mm512_srai_epi32(sums[r], 8);
  for (int r = 0; r < kRows; ++r) sums[r] = _mm512_dpbusd_epi32(sums[r], bytes[r], high);
}

// The same of several quads of taps.
VBMI_INLINE void multiply_add(const uint8_t* pixels, int64_t row_stride, __m512i places, const BlockTaps* taps,
                              int64_t count, __m512i* sums) {
  for (int64_t row = 0; row < kRows; ++row, pixels += row_stride) {
    __m512i high = _mm512_setzero_si512(), middle = high, low = broadcast(1 << (kFractionBits - 1));
    for (int64_t i = 0; i < count; ++i) {
      const __m512i bytes = _mm512_permutexvar_epi8(places, _mm512_loadu_si512(pixels + i * 4 * kChannels));
      high = _mm512_dpbusd_epi32(high, bytes, load(taps[i].words[0]));
      middle = _mm512_dpbusd_epi32(middle, bytes, load(taps[i].words[1]));
      low = _mm512_dpbusd_epi32(low, bytes, load(taps[i].words[2]));
    }
    const __m512i sum = _mm512_add_epi32(middle, _mm512_srai_epi32(low, 8));
    sums[row] = _mm512_add_epi32(high, _mm512_srai_epi32(sum, 8));
  }
}

VBMI void horizontal_blocks(const uint8_t* pixels, int64_t row_stride, const OutputBlock* blocks, int64_t count,
                            const BlockTaps* all_taps, QuadRows dst) {
  const __m512i transpose = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int64_t x = 0; x < 16 * count; x += 16, ++blocks) {
    const uint8_t* src = pixels + kChannels * blocks->first;
    const BlockTaps* taps = all_taps + blocks->taps;
    for (int64_t quad = 0; quad < kBandQuads; ++quad, src += kRows * row_stride) {
      for (int64_t channel = 0; channel < kChannels; ++channel) {
        const __m512i places = load(blocks->places[channel]);
        __m512i sums[kRows];
        if (blocks->count == 1) {
          multiply(src, row_stride, places, *taps, sums);
        } else {
          multiply_add(src, row_stride, places, taps, blocks->count, sums);
        }
        const __m512i bytes = _mm512_shuffle_epi8(pack(sums[0], sums[1], sums[2], sums[3]), transpose);
        store_quarters(bytes, dst.quads + quad * dst.stride + quad_place(channel * dst.plane + x), 16);
      }
    }
  }
}

}  // namespace

const ResizeKernels kResizeAvx512Vbmi = [] {
  ResizeKernels kernels = kResizeAvx512Vnni;
  kernels.horizontal_blocks = horizontal_blocks;
  return kernels;
}();

}  // namespace rtp_mm

#endif
