// NEON with the int8 matrix extension: usdot multiplies four unsigned bytes by four signed ones, as AVX-512's vpdpbusd
// does, and takes the signed ones from a lane.

#ifdef __aarch64__

#include <arm_neon.h>

#include "cpu/isa.h"
#include "cpu/resize_kernels.h"

#define I8MM RTP_MM_I8MM
#define I8MM_INLINE I8MM __attribute__((always_inline)) inline

namespace rtp_mm {
namespace {

constexpr int64_t kVectors = 4;  // of four dwords each: 16 rows, or every fourth dword of a block

I8MM_INLINE uint8x16_t load(const uint32_t* quads) { return vreinterpretq_u8_u32(vld1q_u32(quads)); }

// The upper 16 bits of an output's sums; `quad(i, v)` points to vector v of its i-th quad. The rounding is in the sum
// of low bytes, from where both shifts carry it.
template <class Quad>
I8MM_INLINE void dot(const OutputTaps& output, const QuadTaps* all_taps, Quad quad, int32x4_t* sums) {
  const QuadTaps* taps = all_taps + output.taps;
  const uint8x16_t mask = vreinterpretq_u8_u32(vdupq_n_u32(output.mask));
  const int32x4_t zero = vdupq_n_s32(0), rounding = vdupq_n_s32(1 << (kFractionBits - 1));
  int8x16_t words = vreinterpretq_s8_s32(vld1q_s32(taps->words));
  int32x4_t high[kVectors], middle[kVectors], low[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const uint8x16_t bytes = vbslq_u8(mask, load(quad(0, v)), load(quad(output.count, v)));
    high[v] = vusdotq_laneq_s32(zero, bytes, words, 0);
    middle[v] = vusdotq_laneq_s32(zero, bytes, words, 1);
    low[v] = vusdotq_laneq_s32(rounding, bytes, words, 2);
  }
  for (int32_t i = 1; i < output.count; ++i) {
    words = vreinterpretq_s8_s32(vld1q_s32(taps[i].words));
    for (int v = 0; v < kVectors; ++v) {
      const uint8x16_t bytes = load(quad(i, v));
      high[v] = vusdotq_laneq_s32(high[v], bytes, words, 0);
      middle[v] = vusdotq_laneq_s32(middle[v], bytes, words, 1);
      low[v] = vusdotq_laneq_s32(low[v], bytes, words, 2);
    }
  }
  for (int v = 0; v < kVectors; ++v) sums[v] = vsraq_n_s32(high[v], vsraq_n_s32(middle[v], low[v], 8), 8);
}

// Four vectors of sums to bytes, clamped, one vector after the other.
I8MM_INLINE uint8x16_t pack(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
  constexpr int kRest = kFractionBits - 16;
  const int16x8_t ab = vqmovn_high_s32(vqmovn_s32(a), b), cd = vqmovn_high_s32(vqmovn_s32(c), d);
  return vqshrun_high_n_s16(vqshrun_n_s16(ab, kRest), cd, kRest);
}

// Where a pixel's channels stand in four pixels: four reds, four greens, four blues, nothing.
template <int64_t kPixelStride>
uint8x16_t channels() {
  constexpr uint8_t s = kPixelStride, kNothing = 255;
  constexpr uint8_t kPlaces[16] = {0, s,     2 * s,     3 * s,     1,        s + 1,    2 * s + 1, 3 * s + 1,
                                   2, s + 2, 2 * s + 2, 3 * s + 2, kNothing, kNothing, kNothing,  kNothing};
  return vld1q_u8(kPlaces);
}

template <int64_t kPixelStride>
void gather(const uint8_t* pixels, int64_t row_stride, int64_t quads, uint32_t* columns) {
  const uint8x16_t places = channels<kPixelStride>();
  for (int64_t quad = 0; quad < quads; ++quad, pixels += 4 * kPixelStride, columns += kChannels * kBandRows) {
    for (int64_t row = 0; row < kBandRows; row += 4) {
      const auto pixels_of = [&](int64_t i) {
        return vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(pixels + (row + i) * row_stride), places));
      };
      const uint32x4_t a = pixels_of(0), b = pixels_of(1), c = pixels_of(2), d = pixels_of(3);
      const auto pairs = [](uint32x4_t x) { return vreinterpretq_u64_u32(x); };
      const uint64x2_t ab = pairs(vzip1q_u32(a, b)), cd = pairs(vzip1q_u32(c, d));
      const uint64x2_t blue_ab = pairs(vzip2q_u32(a, b)), blue_cd = pairs(vzip2q_u32(c, d));
      vst1q_u32(columns + row, vreinterpretq_u32_u64(vzip1q_u64(ab, cd)));
      vst1q_u32(columns + row + kBandRows, vreinterpretq_u32_u64(vzip2q_u64(ab, cd)));
      vst1q_u32(columns + row + 2 * kBandRows, vreinterpretq_u32_u64(vzip1q_u64(blue_ab, blue_cd)));
    }
  }
}

void gather_columns(const uint8_t* pixels, int64_t row_stride, int64_t pixel_stride, int64_t quads, uint32_t* columns) {
  if (pixel_stride == 3) {
    gather<3>(pixels, row_stride, quads, columns);
  } else {
    gather<4>(pixels, row_stride, quads, columns);
  }
}

I8MM void horizontal(const uint32_t* columns, int64_t first, const OutputTaps* outputs, const QuadTaps* taps,
                     int64_t begin, int64_t end, QuadRows dst, Ahead& ahead) {
  for (int64_t x = begin; x < end; x += 4) {
    ahead.step();
    for (int64_t channel = 0; channel < kChannels; ++channel) {
      int32x4_t sums[4][kVectors];
      for (int64_t i = 0; i < 4; ++i) {
        const uint32_t* start = columns + ((outputs[x + i].first - first) * kChannels + channel) * kBandRows;
        dot(
            outputs[x + i], taps,
            [&](int64_t quad, int64_t vector) { return start + quad * kChannels * kBandRows + 4 * vector; }, sums[i]);
      }
      uint32_t* place = dst.quads + quad_place(channel * dst.plane + x);
      for (int64_t quad = 0; quad < kBandQuads; ++quad) {
        const uint8x16_t bytes = pack(sums[0][quad], sums[1][quad], sums[2][quad], sums[3][quad]);
        vst1q_u32(place + quad * dst.stride, vreinterpretq_u32_u8(bytes));
      }
    }
  }
}

void interleave(const uint8_t* rows, int64_t row_stride, int64_t blocks, uint32_t* quads) {
  for (int64_t block = 0; block < blocks; ++block, quads += kBlock) {
    for (int64_t i = 0; i < kBlock / 4; i += 4, rows += 16) {
      const uint8x16_t a = vld1q_u8(rows), b = vld1q_u8(rows + row_stride), c = vld1q_u8(rows + 2 * row_stride),
                       d = vld1q_u8(rows + 3 * row_stride);
      const auto pairs = [](uint8x16_t x) { return vreinterpretq_u16_u8(x); };
      const uint16x8_t ab_low = pairs(vzip1q_u8(a, b)), ab_high = pairs(vzip2q_u8(a, b));
      const uint16x8_t cd_low = pairs(vzip1q_u8(c, d)), cd_high = pairs(vzip2q_u8(c, d));
      vst1q_u32(quads + i, vreinterpretq_u32_u16(vzip1q_u16(ab_low, cd_low)));
      vst1q_u32(quads + i + 16, vreinterpretq_u32_u16(vzip2q_u16(ab_low, cd_low)));
      vst1q_u32(quads + i + 32, vreinterpretq_u32_u16(vzip1q_u16(ab_high, cd_high)));
      vst1q_u32(quads + i + 48, vreinterpretq_u32_u16(vzip2q_u16(ab_high, cd_high)));
    }
  }
}

I8MM void vertical(const uint32_t* const* quads, const OutputTaps& output, const QuadTaps* taps, int64_t blocks,
                   uint8_t* row, Ahead& ahead) {
  for (int64_t block = 0; block < blocks * kBlock; block += kBlock) {
    ahead.step();
    for (int64_t i = 0; i < kBlock / 4; i += 4, row += 16) {
      int32x4_t sums[kVectors];
      dot(output, taps, [&](int64_t quad, int64_t vector) { return quads[quad] + block + i + 16 * vector; }, sums);
      vst1q_u8(row, pack(sums[0], sums[1], sums[2], sums[3]));
    }
  }
}

void separate(const uint32_t* quads, int64_t blocks, uint8_t* rows, int64_t row_stride) {
  for (int64_t block = 0; block < blocks; ++block, quads += kBlock) {
    for (int64_t i = 0; i < kBlock / 4; i += 4, rows += 16) {
      const auto vector = [&](int64_t v) { return vreinterpretq_u8_u32(vld1q_u32(quads + i + 16 * v)); };
      const uint8x16_t a = vector(0), b = vector(1), c = vector(2), d = vector(3);
      const uint8x16_t rows02_left = vuzp1q_u8(a, b), rows02_right = vuzp1q_u8(c, d);
      const uint8x16_t rows13_left = vuzp2q_u8(a, b), rows13_right = vuzp2q_u8(c, d);
      vst1q_u8(rows, vuzp1q_u8(rows02_left, rows02_right));
      vst1q_u8(rows + row_stride, vuzp1q_u8(rows13_left, rows13_right));
      vst1q_u8(rows + 2 * row_stride, vuzp2q_u8(rows02_left, rows02_right));
      vst1q_u8(rows + 3 * row_stride, vuzp2q_u8(rows13_left, rows13_right));
    }
  }
}

}  // namespace

const ResizeKernels kResizeNeonI8mm = {signed_byte_taps, gather_columns, horizontal, nullptr,
                                       interleave,       vertical,       separate,   cut_patches};

}  // namespace rtp_mm

#endif
