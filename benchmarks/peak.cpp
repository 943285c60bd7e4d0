// Multiplies and adds in registers, as fast as one core can: the roofs over kernels of float32 and of bfloat16.

#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int kChains = 12;  // independent ones: more than latency times throughput, fewer than registers

// Each returns the floating-point operations it did. `out` holds a start for each chain, and then its end.

extern "C" double float32_peak(long rounds, float factor, float* out) {
  Vector chains[kChains];
  for (int j = 0; j < kChains; ++j) chains[j] = Vector{} + out[j];
  for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) chains[j] = chains[j] * factor + factor;
  }
  for (int j = 0; j < kChains; ++j) out[j] = chains[j][0];
  return 2.0 * kChains * kLanes * static_cast<double>(rounds);
}

#if defined(__AVX512BF16__)
extern "C" double avx512_bf16_peak(long rounds, float factor, float* out) {
  __m512 chains[kChains];
  for (int j = 0; j < kChains; ++j) chains[j] = _mm512_set1_ps(out[j]);
  const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_set1_ps(factor), _mm512_set1_ps(factor));
  for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) chains[j] = _mm512_dpbf16_ps(chains[j], pairs, pairs);
  }
  for (int j = 0; j < kChains; ++j) out[j] = _mm512_cvtss_f32(chains[j]);
  return 4.0 * kChains * 16 * static_cast<double>(rounds);
}
#endif

#if defined(__AMX_BF16__)
// Four tiles of sums, as many as a kernel holds beside those that it multiplies.
extern "C" double amx_peak(long rounds, float, float*) {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData)) return 0;
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } configuration;
  asm volatile("ldtilecfg %0" : : "m"(configuration));  // which zeroes them
  for (long i = 0; i < rounds; ++i) {
    asm volatile("tdpbf16ps %tmm6, %tmm4, %tmm0");
    asm volatile("tdpbf16ps %tmm7, %tmm4, %tmm1");
    asm volatile("tdpbf16ps %tmm6, %tmm5, %tmm2");
    asm volatile("tdpbf16ps %tmm7, %tmm5, %tmm3");
  }
  asm volatile("tilerelease");
  return 4 * 2.0 * 16 * 16 * 32 * static_cast<double>(rounds);
}
#endif
