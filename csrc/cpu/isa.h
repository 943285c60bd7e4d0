// Instruction sets, and the one way to compile a kernel for each of them and to choose among them at run time.

#pragma once

namespace rtp_mm {

// Each one a superset of those before.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Vnni };

inline Isa best_isa() {  // of this CPU
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512vnni") ? Isa::kAvx512Vnni : Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

// What a kernel knows of an instruction set: floats in a vector, and how many vectors a matrix product may hold.
// Without FMA a product and its sum need a few of the 16 registers. kVectors is the width of the widest strip: the
// wider, the fewer loads, until too few rows are left.
struct Portable {
  static constexpr int kLanes = 4, kRegisters = 12, kVectors = 2;
};
struct Avx2 {
  static constexpr int kLanes = 8, kRegisters = 16, kVectors = 2;
};
struct Avx512 {
  static constexpr int kLanes = 16, kRegisters = 32, kVectors = 4;
};
struct Avx512Vnni : Avx512 {};

#define RTP_MM_INLINE [[gnu::always_inline]] inline

namespace detail {

#ifdef __x86_64__
template <class Arch, class Kernel, class... Args>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void on_avx512(Args... args) {
  Kernel::template run<Arch>(args...);
}

template <class Kernel, class... Args>
__attribute__((target("avx2,fma"))) void on_avx2(Args... args) {
  Kernel::template run<Avx2>(args...);
}
#endif

template <class Kernel, class... Args>
void on_portable(Args... args) {
  Kernel::template run<Portable>(args...);
}

}  // namespace detail

// Kernel::run<Arch>(args...), compiled for `isa`. All that it calls must be RTP_MM_INLINE, as it is itself: only what
// is inlined gets the caller's instructions. A kernel whose kUsesVnni is true is compiled for Avx512Vnni too.
template <class Kernel, class... Args>
void run(Isa isa, Args... args) {
#ifdef __x86_64__
  if constexpr (requires { requires Kernel::kUsesVnni; }) {
    if (isa == Isa::kAvx512Vnni) return detail::on_avx512<Avx512Vnni, Kernel, Args...>(args...);
  }
  if (isa >= Isa::kAvx512) return detail::on_avx512<Avx512, Kernel, Args...>(args...);
  if (isa == Isa::kAvx2) return detail::on_avx2<Kernel, Args...>(args...);
#endif
  detail::on_portable<Kernel, Args...>(args...);
}

}  // namespace rtp_mm
