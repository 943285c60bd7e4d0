// Instruction sets, and the one way to compile a kernel for each of them and to choose among them at run time.

#pragma once

#ifdef __aarch64__
#include <sys/auxv.h>
#else
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#endif

namespace rtp_mm {

// Each one a superset of those before. Portable is what every CPU of the architecture has: SSE2 on x86-64, NEON on ARM.
#ifdef __aarch64__
enum class Isa { kPortable, kNeonI8mm };
#else
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx };
#endif

#if defined(__x86_64__)
// Whether the CPU has AMX's tiles, of bytes and of bfloat16s, and the system gives them to this process, which has to
// ask. RTP_MM_AMX=0 forbids them: bfloat16s are summed then as on a CPU that has AVX-512 BF16 alone.
inline bool may_use_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // Linux's ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kAmx = 1u << 22 | 1u << 24 | 1u << 25;    // of cpuid 7: bf16, tiles, int8
  const char* choice = std::getenv("RTP_MM_AMX");
  unsigned a = 0, b = 0, c = 0, d = 0;
  return !(choice && std::strcmp(choice, "0") == 0) && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmx) == kAmx &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

inline Isa best_isa() {  // of this CPU
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) {
    return Isa::kPortable;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx2;
  }
  if (!__builtin_cpu_supports("avx512vnni")) return Isa::kAvx512;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Vnni;
  static const bool may_use_it = may_use_amx();
  return may_use_it ? Isa::kAmx : Isa::kAvx512Bf16;
#elif defined(__aarch64__)
  constexpr unsigned long kHwcap2I8mm = 1 << 13;  // Linux's HWCAP2_I8MM, which older headers lack
  return getauxval(AT_HWCAP2) & kHwcap2I8mm ? Isa::kNeonI8mm : Isa::kPortable;
#else
  return Isa::kPortable;
#endif
}

// Whether one instruction multiplies words of four bytes: without, int8 products are slower than float32's.
inline bool multiplies_bytes(Isa isa) {
#ifdef __aarch64__
  return isa == Isa::kNeonI8mm;
#else
  return isa >= Isa::kAvx512Vnni;
#endif
}

// Whether matrix products of words are made by AMX's tiles.
inline bool has_amx([[maybe_unused]] Isa isa) {
#ifdef __aarch64__
  return false;
#else
  return isa == Isa::kAmx;
#endif
}

// By what bfloat16s are multiplied faster than float32s, if by anything. Not by Intel's AVX-512 BF16, whose one
// instruction takes as long as four multiply-adds of float32, each of which does half as much (benchmarks/peak.py).
inline const char* bf16_instructions([[maybe_unused]] Isa isa) {
#ifndef __aarch64__
  if (isa == Isa::kAmx) return "amx";
  if (isa == Isa::kAvx512Bf16 && !__builtin_cpu_is("intel")) return "avx512_bf16";
#endif
  return "";
}

// What a kernel knows of an instruction set: floats in a vector, and how many vectors a matrix product may hold;
// whether it is AVX-512, which has instructions of its own for some functions of vectors; and whether one instruction
// multiplies words of four bytes, or of two bfloat16s (see multiply_add). Without FMA a product and its sum need a few
// of the 16 registers. kVectors is the width of the widest strip: the wider, the fewer loads, until too few rows are
// left.
struct Portable {
#ifdef __aarch64__
  static constexpr int kLanes = 4, kRegisters = 28, kVectors = 4;
#else
  static constexpr int kLanes = 4, kRegisters = 12, kVectors = 2;
#endif
  static constexpr bool kIsAvx512 = false, kMultipliesBytes = false, kMultipliesPairs = false;
};
struct NeonI8mm : Portable {
  static constexpr bool kMultipliesBytes = true;
};
struct Avx2 {
  static constexpr int kLanes = 8, kRegisters = 16, kVectors = 2;
  static constexpr bool kIsAvx512 = false, kMultipliesBytes = false, kMultipliesPairs = false;
};
struct Avx512 {
  static constexpr int kLanes = 16, kRegisters = 32, kVectors = 4;
  static constexpr bool kIsAvx512 = true, kMultipliesBytes = false, kMultipliesPairs = false;
};
struct Avx512Vnni : Avx512 {
  static constexpr bool kMultipliesBytes = true;
};
struct Avx512Bf16 : Avx512Vnni {
  static constexpr bool kMultipliesPairs = true;
};

// clang looks at the vectors of a function before it is inlined, where it has the portable instructions alone.
#if defined(__x86_64__) && !defined(__clang__)
#define RTP_MM_X86_KERNELS
#endif

#define RTP_MM_INLINE [[gnu::always_inline]] inline

// Compiles a function for NeonI8mm. The assembler wants armv8.2-a for it, which the build's own options, where it has
// some, must not be brought down to.
#ifdef __aarch64__
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define RTP_MM_I8MM
#elif defined(__ARM_FEATURE_DOTPROD)
#define RTP_MM_I8MM __attribute__((target("+i8mm")))
#else
#define RTP_MM_I8MM __attribute__((target("arch=armv8.2-a+i8mm")))
#endif
#endif

namespace detail {

#ifdef RTP_MM_X86_KERNELS
template <class Arch, class Kernel, class... Args>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,bmi,bmi2"))) void on_avx512(Args... args) {
  Kernel::template run<Arch>(args...);
}

template <class Kernel, class... Args>
__attribute__((target("avx2,fma,bmi,bmi2"))) void on_avx2(Args... args) {
  Kernel::template run<Avx2>(args...);
}
#elif defined(__aarch64__)
template <class Kernel, class... Args>
RTP_MM_I8MM void on_neon_i8mm(Args... args) {
  Kernel::template run<NeonI8mm>(args...);
}
#endif

template <class Kernel, class... Args>
void on_portable(Args... args) {
  Kernel::template run<Portable>(args...);
}

}  // namespace detail

// Kernel::run<Arch>(args...), compiled for `isa`. All that it calls must be RTP_MM_INLINE, as it is itself: only what
// is inlined gets the caller's instructions. A kernel whose kMultipliesBytes or kMultipliesPairs is true is compiled
// for those that do too.
template <class Kernel, class... Args>
void run([[maybe_unused]] Isa isa, Args... args) {
  [[maybe_unused]] constexpr bool kMultipliesBytes = requires { requires Kernel::kMultipliesBytes; };
#ifdef RTP_MM_X86_KERNELS
  if constexpr (requires { requires Kernel::kMultipliesPairs; }) {
    if (isa >= Isa::kAvx512Bf16) return detail::on_avx512<Avx512Bf16, Kernel, Args...>(args...);
  }
  if constexpr (kMultipliesBytes) {
    if (isa >= Isa::kAvx512Vnni) return detail::on_avx512<Avx512Vnni, Kernel, Args...>(args...);
  }
  if (isa >= Isa::kAvx512) return detail::on_avx512<Avx512, Kernel, Args...>(args...);
  if (isa == Isa::kAvx2) return detail::on_avx2<Kernel, Args...>(args...);
#elif defined(__aarch64__)
  if constexpr (kMultipliesBytes) {
    if (isa == Isa::kNeonI8mm) return detail::on_neon_i8mm<Kernel, Args...>(args...);
  }
#endif
  detail::on_portable<Kernel, Args...>(args...);
}

}  // namespace rtp_mm
