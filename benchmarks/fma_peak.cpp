// Multiplies and adds in registers, as fast as one core can: the roof over every float32 kernel.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int kChains = 12;  // independent ones: more than latency times throughput, fewer than registers

// Returns the floating-point operations it did. `out` holds a start for each chain, and then its end.
extern "C" double fma_peak(long rounds, float factor, float* out) {
  Vector chains[kChains];
  for (int j = 0; j < kChains; ++j) chains[j] = Vector{} + out[j];
  for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) chains[j] = chains[j] * factor + factor;
  }
  for (int j = 0; j < kChains; ++j) out[j] = chains[j][0];
  return 2.0 * kChains * kLanes * static_cast<double>(rounds);
}
