// Vectors of 16-bit integers, and what JPEG's arithmetic needs of them beyond operators. Instructions of 256 and 512
// bits work within each 16 bytes, and so does all of this.

#pragma once

#include <cstdint>

#include "cpu/isa.h"

// All that takes or returns a vector is inlined, so it has no calling convention that could depend on the target.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace rtp_mm {

template <class Arch>
struct ShortVectors {
  static constexpr int kBytes = 4 * Arch::kLanes;
  typedef int16_t Short __attribute__((vector_size(kBytes), may_alias));
  typedef int32_t Int __attribute__((vector_size(kBytes), may_alias));
  typedef int64_t Long __attribute__((vector_size(kBytes), may_alias));
  typedef uint16_t UnsignedShort __attribute__((vector_size(kBytes), may_alias));
  typedef uint32_t UnsignedInt __attribute__((vector_size(kBytes), may_alias));
};

template <class Arch>
using Shorts = typename ShortVectors<Arch>::Short;
template <class Arch>
using Ints = typename ShortVectors<Arch>::Int;
template <class Arch>
using Longs = typename ShortVectors<Arch>::Long;

// Operators that wrap around where integers overflow.
#define RTP_MM_WRAPPING(name, sign, Element)                                                             \
  template <class Arch>                                                                                  \
  RTP_MM_INLINE Element##s<Arch> name(Element##s<Arch> a, Element##s<Arch> b) {                          \
    using Bits = typename ShortVectors<Arch>::Unsigned##Element;                                         \
    return reinterpret_cast<Element##s<Arch>>(reinterpret_cast<Bits>(a) sign reinterpret_cast<Bits>(b)); \
  }
RTP_MM_WRAPPING(add, +, Short)
RTP_MM_WRAPPING(add, +, Int)
RTP_MM_WRAPPING(subtract, -, Short)
RTP_MM_WRAPPING(subtract, -, Int)
RTP_MM_WRAPPING(multiply, *, Short)
#undef RTP_MM_WRAPPING

// A function of a and b that is one instruction of x86-64, on every instruction set of it, and `...` elsewhere, where
// vectors have 16 bytes. By assembler, as gcc 12 does not find all of them by itself, or not those of 64 bytes.
#ifdef __x86_64__
#define RTP_MM_BINARY(Result, name, Operand, instruction, ...)            \
  template <class Arch>                                                   \
  RTP_MM_INLINE Result<Arch> name(Operand<Arch> a, Operand<Arch> b) {     \
    auto result = reinterpret_cast<Result<Arch>>(a);                      \
    if constexpr (Arch::kLanes > 4) {                                     \
      asm("v" instruction " %2, %1, %0" : "=v"(result) : "v"(a), "v"(b)); \
    } else {                                                              \
      asm(instruction " %1, %0" : "+x"(result) : "x"(b));                 \
    }                                                                     \
    return result;                                                        \
  }
#else
#define RTP_MM_BINARY(Result, name, Operand, instruction, ...)        \
  template <class Arch>                                               \
  RTP_MM_INLINE Result<Arch> name(Operand<Arch> a, Operand<Arch> b) { \
    __VA_ARGS__                                                       \
  }
typedef int32_t EightInts __attribute__((vector_size(32)));
typedef int16_t SixteenShorts __attribute__((vector_size(32)));
typedef uint8_t SixteenBytes __attribute__((vector_size(16)));

template <int kLow, int kHigh, class Vector>
RTP_MM_INLINE Vector clamped(Vector x) {
  x = x < kLow ? Vector{} + kLow : x;
  return x > kHigh ? Vector{} + kHigh : x;
}
#endif

// The first halves of a and b in turns, element by element of 16, 32 or 64 bits; and the second halves.
RTP_MM_BINARY(Shorts, zip_low, Shorts, "punpcklwd", return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);)
RTP_MM_BINARY(Shorts, zip_high, Shorts, "punpckhwd", return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);)
RTP_MM_BINARY(Ints, zip_low, Ints, "punpckldq", return __builtin_shufflevector(a, b, 0, 4, 1, 5);)
RTP_MM_BINARY(Ints, zip_high, Ints, "punpckhdq", return __builtin_shufflevector(a, b, 2, 6, 3, 7);)
RTP_MM_BINARY(Longs, zip_low, Longs, "punpcklqdq", return __builtin_shufflevector(a, b, 0, 2);)
RTP_MM_BINARY(Longs, zip_high, Longs, "punpckhqdq", return __builtin_shufflevector(a, b, 1, 3);)

// Products of 16 bits each, added two by two.
RTP_MM_BINARY(Ints, multiply_add_pairs, Shorts, "pmaddwd", const auto x = reinterpret_cast<Ints<Arch>>(a),
              y = reinterpret_cast<Ints<Arch>>(b);
              return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);)

// The upper halves of products.
RTP_MM_BINARY(Shorts, multiply_high, Shorts, "pmulhw",
              const EightInts products = __builtin_convertvector(a, EightInts) * __builtin_convertvector(b, EightInts);
              return __builtin_convertvector(products >> 16, Shorts<Arch>);)

// Those of a, then those of b, clamped to 16 bits.
RTP_MM_BINARY(Shorts, pack, Ints, "packssdw",
              const EightInts both = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
              return __builtin_convertvector(clamped<-32768, 32767>(both), Shorts<Arch>);)

// Those of a, then those of b, clamped to 0 to 255.
RTP_MM_BINARY(Longs, pack_bytes, Shorts, "packuswb",
              const SixteenShorts both = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                                                                 15);
              return reinterpret_cast<Longs<Arch>>(__builtin_convertvector(clamped<0, 255>(both), SixteenBytes));)
#undef RTP_MM_BINARY

template <class Arch>
RTP_MM_INLINE Shorts<Arch> magnitude(Shorts<Arch> a) {
#ifdef __x86_64__
  if constexpr (Arch::kLanes > 4) {
    asm("vpabsw %0, %0" : "+v"(a));
    return a;
  }
#endif
  return a < 0 ? subtract<Arch>(Shorts<Arch>{}, a) : a;
}

}  // namespace rtp_mm
