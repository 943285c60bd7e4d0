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

#ifdef __x86_64__
// Of AVX2 and AVX-512, which gcc 12 does not find by itself, or not in this form.
#define RTP_MM_BY(instruction)                                      \
  if constexpr (Arch::kLanes > 4) {                                 \
    decltype(a) result;                                             \
    asm(instruction " %2, %1, %0" : "=v"(result) : "v"(a), "v"(b)); \
    return result;                                                  \
  }
#else
#define RTP_MM_BY(instruction)
#endif

// The first halves of a and b in turns, element by element of 16, 32 or 64 bits; and the second halves.
template <class Arch>
RTP_MM_INLINE Shorts<Arch> zip_low(Shorts<Arch> a, Shorts<Arch> b) {
  RTP_MM_BY("vpunpcklwd")
  if constexpr (Arch::kLanes == 4) return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}

template <class Arch>
RTP_MM_INLINE Shorts<Arch> zip_high(Shorts<Arch> a, Shorts<Arch> b) {
  RTP_MM_BY("vpunpckhwd")
  if constexpr (Arch::kLanes == 4) return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}

template <class Arch>
RTP_MM_INLINE Ints<Arch> zip_low(Ints<Arch> a, Ints<Arch> b) {
  RTP_MM_BY("vpunpckldq")
  if constexpr (Arch::kLanes == 4) return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}

template <class Arch>
RTP_MM_INLINE Ints<Arch> zip_high(Ints<Arch> a, Ints<Arch> b) {
  RTP_MM_BY("vpunpckhdq")
  if constexpr (Arch::kLanes == 4) return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}

template <class Arch>
RTP_MM_INLINE Longs<Arch> zip_low(Longs<Arch> a, Longs<Arch> b) {
  RTP_MM_BY("vpunpcklqdq")
  if constexpr (Arch::kLanes == 4) return __builtin_shufflevector(a, b, 0, 2);
}

template <class Arch>
RTP_MM_INLINE Longs<Arch> zip_high(Longs<Arch> a, Longs<Arch> b) {
  RTP_MM_BY("vpunpckhqdq")
  if constexpr (Arch::kLanes == 4) return __builtin_shufflevector(a, b, 1, 3);
}

template <class Arch>
RTP_MM_INLINE Shorts<Arch> magnitude(Shorts<Arch> a) {
#ifdef __x86_64__
  if constexpr (Arch::kLanes > 4) {
    Shorts<Arch> result;
    asm("vpabsw %1, %0" : "=v"(result) : "v"(a));
    return result;
  }
#endif
  return a < 0 ? subtract<Arch>(Shorts<Arch>{}, a) : a;
}

// Products of 16 bits each, added two by two. `b` is the same in all lanes.
template <class Arch>
RTP_MM_INLINE Ints<Arch> multiply_add_pairs(Shorts<Arch> a, Shorts<Arch> b) {
#ifdef __x86_64__
  if constexpr (Arch::kLanes > 4) {
    Ints<Arch> result;
    asm("vpmaddwd %2, %1, %0" : "=v"(result) : "v"(a), "v"(b));
    return result;
  } else {
    Shorts<Arch> result = a;
    asm("pmaddwd %1, %0" : "+x"(result) : "x"(b));
    return reinterpret_cast<Ints<Arch>>(result);
  }
#else
  const auto x = reinterpret_cast<Ints<Arch>>(a), y = reinterpret_cast<Ints<Arch>>(b);
  return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

// The upper halves of products.
template <class Arch>
RTP_MM_INLINE Shorts<Arch> multiply_high(Shorts<Arch> a, Shorts<Arch> b) {
#ifdef __x86_64__
  if constexpr (Arch::kLanes > 4) {
    Shorts<Arch> result;
    asm("vpmulhw %2, %1, %0" : "=v"(result) : "v"(a), "v"(b));
    return result;
  } else {
    asm("pmulhw %1, %0" : "+x"(a) : "x"(b));
    return a;
  }
#else
  typedef int32_t Wide __attribute__((vector_size(32)));
  const Wide products = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
  return __builtin_convertvector(products >> 16, Shorts<Arch>);
#endif
}

// Those of a, then those of b, clamped to 16 bits.
template <class Arch>
RTP_MM_INLINE Shorts<Arch> pack(Ints<Arch> a, Ints<Arch> b) {
#ifdef __x86_64__
  if constexpr (Arch::kLanes > 4) {
    Shorts<Arch> result;
    asm("vpackssdw %2, %1, %0" : "=v"(result) : "v"(a), "v"(b));
    return result;
  } else {
    auto result = reinterpret_cast<Shorts<Arch>>(a);
    asm("packssdw %1, %0" : "+x"(result) : "x"(b));
    return result;
  }
#else
  typedef int32_t Wide __attribute__((vector_size(32)));
  Wide wide = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
  wide = wide < -32768 ? Wide{} - 32768 : wide;
  wide = wide > 32767 ? Wide{} + 32767 : wide;
  return __builtin_convertvector(wide, Shorts<Arch>);
#endif
}

// Those of a, then those of b, clamped to 0 to 255.
template <class Arch>
RTP_MM_INLINE Longs<Arch> pack_bytes(Shorts<Arch> a, Shorts<Arch> b) {
#ifdef __x86_64__
  if constexpr (Arch::kLanes > 4) {
    Longs<Arch> result;
    asm("vpackuswb %2, %1, %0" : "=v"(result) : "v"(a), "v"(b));
    return result;
  } else {
    asm("packuswb %1, %0" : "+x"(a) : "x"(b));
    return reinterpret_cast<Longs<Arch>>(a);
  }
#else
  typedef int16_t Wide __attribute__((vector_size(32)));
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  Wide wide = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  wide = wide < 0 ? Wide{} : wide;
  wide = wide > 255 ? Wide{} + 255 : wide;
  return reinterpret_cast<Longs<Arch>>(__builtin_convertvector(wide, Bytes));
#endif
}

}  // namespace rtp_mm
