// What the kernels for AVX-512 have in common.

#pragma once

// GCC 12 takes its own intrinsics' _mm512_undefined_epi32() for a mistake of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include "cpu/resize_kernels.h"

#define AVX512_TARGETS "avx512f,avx512bw,avx512vl,avx512vnni,prfchw"
#define AVX512 __attribute__((target(AVX512_TARGETS)))
#define AVX512_INLINE AVX512 __attribute__((always_inline)) inline

namespace rtp_mm {

AVX512_INLINE __m512i broadcast(int32_t value) { return _mm512_set1_epi32(value); }

// Four vectors of sums to bytes, clamped: each group of 16 holds those of its group in a, b, c and d.
AVX512_INLINE __m512i pack(__m512i a, __m512i b, __m512i c, __m512i d) {
  constexpr int kRest = kFractionBits - 16;
  return _mm512_packus_epi16(_mm512_srai_epi16(_mm512_packs_epi32(a, b), kRest),
                             _mm512_srai_epi16(_mm512_packs_epi32(c, d), kRest));
}

// Sixteen bytes to each of four places, `stride` dwords apart.
AVX512_INLINE void store_quarters(__m512i bytes, uint32_t* place, int64_t stride) {
  const auto quarter = [&](int64_t i) { return reinterpret_cast<__m128i*>(place + i * stride); };
  _mm_store_si128(quarter(0), _mm512_castsi512_si128(bytes));
  _mm_store_si128(quarter(1), _mm512_extracti32x4_epi32(bytes, 1));
  _mm_store_si128(quarter(2), _mm512_extracti32x4_epi32(bytes, 2));
  _mm_store_si128(quarter(3), _mm512_extracti32x4_epi32(bytes, 3));
}

}  // namespace rtp_mm
