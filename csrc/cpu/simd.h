// Vectors of floats of any instruction set, and the functions of them that kernels need.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cpu/float_formats.h"
#include "cpu/isa.h"

// All that takes or returns a vector is inlined, so it has no calling convention that could depend on the target.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace rtp_mm {

template <int kLanes>
struct Simd {
  typedef int32_t Index __attribute__((vector_size(kLanes * sizeof(int32_t))));
  typedef uint32_t Word __attribute__((vector_size(kLanes * sizeof(uint32_t))));
  typedef uint16_t Half __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(2), may_alias));
  typedef uint8_t Byte __attribute__((vector_size(kLanes), aligned(1), may_alias));
};

// float, int32_t or uint32_t. A vector loads from and stores to any of them.
template <int kLanes, class Word>
struct WordVector {
  typedef Word Type __attribute__((vector_size(kLanes * sizeof(Word)), aligned(sizeof(Word)), may_alias));
};

template <class Arch, class Word = float>
using Vector = typename WordVector<Arch::kLanes, Word>::Type;

template <class Arch>
using IntVector = Vector<Arch, int32_t>;

template <class Arch>
RTP_MM_INLINE Vector<Arch>& at(float* p) {
  return *reinterpret_cast<Vector<Arch>*>(p);
}

template <class Arch>
RTP_MM_INLINE const Vector<Arch>& at(const float* p) {
  return *reinterpret_cast<const Vector<Arch>*>(p);
}

template <class Arch>
RTP_MM_INLINE IntVector<Arch>& at(int32_t* p) {
  return *reinterpret_cast<IntVector<Arch>*>(p);
}

template <class Arch>
RTP_MM_INLINE const IntVector<Arch>& at(const int32_t* p) {
  return *reinterpret_cast<const IntVector<Arch>*>(p);
}

template <class Arch>
using PairVector = Vector<Arch, BFloat16Pair>;

template <class Arch>
RTP_MM_INLINE PairVector<Arch>& at(BFloat16Pair* p) {
  return *reinterpret_cast<PairVector<Arch>*>(p);
}

template <class Arch>
RTP_MM_INLINE const PairVector<Arch>& at(const BFloat16Pair* p) {
  return *reinterpret_cast<const PairVector<Arch>*>(p);
}

// sum += a * b
template <class Arch>
RTP_MM_INLINE void multiply_add(Vector<Arch>& sum, float a, const Vector<Arch>& b) {
  sum += a * b;
}

// The same of words that hold four bytes each, 0 to 255 in `a` and -128 to 127 in `b`: the four products are added.
template <class Arch>
RTP_MM_INLINE void multiply_add(IntVector<Arch>& sum, int32_t a, const IntVector<Arch>& b) {
  if constexpr (Arch::kMultipliesBytes) {
    // gcc 12 spills an array of sums around the intrinsic at every step, and so it does if the assembler's operand is
    // an element of the array itself.
    IntVector<Arch> total = sum;
#if defined(__x86_64__)
    asm("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(IntVector<Arch>{} + a), "v"(b));
#elif defined(__aarch64__)
    asm("usdot %0.4s, %1.16b, %2.16b" : "+w"(total) : "w"(IntVector<Arch>{} + a), "w"(b));
#endif
    sum = total;
  } else {
    for (int shift = 0; shift < 32; shift += 8) sum += (a >> shift & 0xff) * (b << (24 - shift) >> 24);
  }
}

// The same of words that hold two bfloat16s each, whose products are exact in float32: that of the upper halves is
// added first. Without the instruction, which takes subnormal numbers for zero, all others come out the same.
template <class Arch>
RTP_MM_INLINE void multiply_add(Vector<Arch>& sum, BFloat16Pair a, const PairVector<Arch>& b) {
  if constexpr (Arch::kMultipliesPairs) {
    Vector<Arch> total = sum;  // as for bytes
#if defined(__x86_64__)
    asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(PairVector<Arch>{} + a), "v"(b));
#endif
    sum = total;
  } else {
    constexpr BFloat16Pair kUpper = 0xffff0000;
    sum += std::bit_cast<float>(a & kUpper) * reinterpret_cast<Vector<Arch>>(b & kUpper);
    sum += std::bit_cast<float>(a << 16) * reinterpret_cast<Vector<Arch>>(b << 16);
  }
}

// As many lanes as Arch has, or as 16 bytes of narrower elements have: gcc 12 widens and narrows less than that one
// element at a time.
template <class Arch, class Narrow>
struct Wide : Arch {
  static constexpr int kLanes = std::max(Arch::kLanes, static_cast<int>(16 / sizeof(Narrow)));
};

// kLanes values in float32, exactly.
template <class Arch>
RTP_MM_INLINE Vector<Arch> widened(const uint8_t* p) {
  using Types = Simd<Arch::kLanes>;
  // Step by step: gcc 12 would take bytes to words one at a time.
  const auto halves = __builtin_convertvector(*reinterpret_cast<const typename Types::Byte*>(p), typename Types::Half);
  return __builtin_convertvector(__builtin_convertvector(halves, typename Types::Index), Vector<Arch>);
}

template <class Arch>
RTP_MM_INLINE Vector<Arch> widened(const BFloat16* p) {
  using Types = Simd<Arch::kLanes>;
  using Half = typename Types::Half;
  typename Types::Word bits;
#ifdef __x86_64__
  if constexpr (Arch::kIsAvx512) {  // of which gcc 12 makes five instructions
    asm("vpmovzxwd %1, %0" : "=v"(bits) : "m"(*reinterpret_cast<const Half*>(p)));
    return reinterpret_cast<Vector<Arch>>(bits << 16);
  }
#endif
  bits = __builtin_convertvector(*reinterpret_cast<const Half*>(p), typename Types::Word);
  return reinterpret_cast<Vector<Arch>>(bits << 16);
}

template <class Arch>
RTP_MM_INLINE Vector<Arch> widened(const Float16* p) {
  using Types = Simd<Arch::kLanes>;
  const auto bits = __builtin_convertvector(*reinterpret_cast<const typename Types::Half*>(p), typename Types::Word);
  const auto magnitude = bits & 0x7fff;
  // The product moves the exponent's bias from 15 to 127 and normalises; infinity and NaN go up to the top.
  const Vector<Arch> scaled = reinterpret_cast<Vector<Arch>>(magnitude << 13) * 0x1p112f;
  const auto top = reinterpret_cast<typename Types::Index>(0x7bff - magnitude) >> 31 & 0x7f800000;
  const auto word = reinterpret_cast<typename Types::Word>(scaled) | reinterpret_cast<typename Types::Word>(top);
  return reinterpret_cast<Vector<Arch>>(word | (bits & 0x8000) << 16);
}

template <class Arch>
RTP_MM_INLINE Vector<Arch> widened(const float* p) {
  return at<Arch>(p);
}

// Rounded to bfloat16, ties to even, in the upper half of each word; the lower half is what was rounded away. NaN stays
// NaN.
template <class Arch>
RTP_MM_INLINE PairVector<Arch> rounded(Vector<Arch> x) {
  const auto bits = reinterpret_cast<PairVector<Arch>>(x);
  const PairVector<Arch> carried = bits + 0x7fff + (bits >> 16 & 1);
  return x == x ? carried : bits | 0x00400000;
}

template <class Arch>
RTP_MM_INLINE void narrow(Vector<Arch> x, BFloat16* dst) {
  using Half = typename Simd<Arch::kLanes>::Half;
  *reinterpret_cast<Half*>(dst) = __builtin_convertvector(rounded<Arch>(x) >> 16, Half);
}

template <class Arch>
RTP_MM_INLINE void narrow(Vector<Arch> x, float* dst) {
  at<Arch>(dst) = x;
}

// One number, as the vectors do it.
inline void narrow(float x, BFloat16* dst) {
  const auto bits = std::bit_cast<uint32_t>(x);
  dst->bits = static_cast<uint16_t>((x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x00400000) >> 16);
}

inline void narrow(float x, float* dst) { *dst = x; }

inline float widened(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline float widened(float x) { return x; }

// How many rows before they are read those of a strided matrix are fetched: each is in a page of its own, where no
// hardware looks ahead.
constexpr int64_t kRowsReadAhead = 8;

template <class Element>
RTP_MM_INLINE void prefetch(const Element* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(Element)) __builtin_prefetch(row + i, 0, 3);
  __builtin_prefetch(row + count - 1, 0, 3);
}

// The sum of a vector's lanes, folded in halves.
template <class Arch>
RTP_MM_INLINE float sum(const Vector<Arch>& x) {
  float lanes[Arch::kLanes];
  at<Arch>(lanes) = x;
  for (int half = Arch::kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Lane j of rows[i] to lane i of rows[j]: in every round rows kHalf apart trade a half of each of their squares.
template <class Arch, int kHalf = Arch::kLanes / 2>
RTP_MM_INLINE void transpose(Vector<Arch> (&rows)[Arch::kLanes]) {
  typename Simd<Arch::kLanes>::Index low, high;  // of the lanes of two rows, one after the other
  for (int j = 0; j < Arch::kLanes; ++j) {
    low[j] = j & kHalf ? Arch::kLanes + j - kHalf : j;
    high[j] = j & kHalf ? Arch::kLanes + j : j + kHalf;
  }
  for (int i = 0; i < Arch::kLanes; ++i) {
    if (i & kHalf) continue;
    const Vector<Arch> a = rows[i], b = rows[i + kHalf];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kHalf] = __builtin_shuffle(a, b, high);
  }
  if constexpr (kHalf > 1) transpose<Arch, kHalf / 2>(rows);
}

// Coefficients from the highest power down, at least two.
template <class Arch, class... Floats>
RTP_MM_INLINE Vector<Arch> polynomial(Vector<Arch> x, float highest, float next, Floats... others) {
  Vector<Arch> sum = x * highest + next;
  ((sum = sum * x + others), ...);
  return sum;
}

// e^x, relative error at most 1.2e-7, for x clamped to [-87, 88]; NaN stays NaN. Below -87 that is 1.6e-38, which
// vanishes beside the 1 that it is added to.
template <class Arch>
RTP_MM_INLINE Vector<Arch> exp(Vector<Arch> x) {
  const Vector<Arch> zero = {}, low = zero - 87.0f, high = zero + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  // 1.5 * 2^23 leaves no fraction bits, so the sum rounds to n = round(x / ln 2), whose bits are its lowest.
  const Vector<Arch> shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const Vector<Arch> r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two terms, the first exact in products
  // Minimax on |r| <= ln 2 / 2, relative error 1.9e-9.
  const Vector<Arch> p =
      polynomial<Arch>(r, 1.3836823e-3f, 8.3748350e-3f, 4.1668227e-2f, 1.6666420e-1f, 4.9999992e-1f, 1.0f, 1.0f);
  const auto bits = (reinterpret_cast<typename Simd<Arch::kLanes>::Word>(shifted) << 23) + 0x3f800000;
  return p * reinterpret_cast<Vector<Arch>>(bits);
}

// 2^x for x < 127, of which less than -126 count as that; 1 for 0, and NaN for NaN. Relative error at most 1.9e-7; a
// rough one's, for what is rounded to bfloat16 (4e-3), 1.1e-4.
template <class Arch, bool kIsRough>
RTP_MM_INLINE Vector<Arch> exp2(Vector<Arch> x) {
  const Vector<Arch> low = Vector<Arch>{} - 126.0f;  // subnormal numbers would take a hundred times as long
  Vector<Arch> p;
#ifdef __x86_64__
  if constexpr (Arch::kIsAvx512) {
    Vector<Arch> r, power;
    asm("vmaxps %1, %2, %0" : "=v"(x) : "v"(x), "v"(low));
    asm("vreduceps $1, %1, %0" : "=v"(r) : "v"(x));  // x - floor(x)
    // Minimax on 0 <= r <= 1 among those that are 1 at 0.
    p = kIsRough ? polynomial<Arch>(r, 7.7067240e-2f, 2.2764498e-1f, 6.9511663e-1f, 1.0f)
                 : polynomial<Arch>(r, 1.8650337e-3f, 9.0226974e-3f, 5.5794484e-2f, 2.4016660e-1f, 6.9315104e-1f, 1.0f);
    asm("vscalefps %2, %1, %0" : "=v"(power) : "v"(p), "v"(x));  // p 2^floor(x)
    return power;
  }
#endif
  x = x < low ? low : x;
  const Vector<Arch> shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);  // as in `exp`
  // Minimax on |r| <= 1/2 among those that are 1 at 0.
  p = kIsRough ? polynomial<Arch>(r, 5.5008933e-2f, 2.4221095e-1f, 6.932829e-1f, 1.0f)
               : polynomial<Arch>(r, 1.326472e-3f, 9.671513e-3f, 5.550734e-2f, 2.4022242e-1f, 6.93147e-1f, 1.0f);
  const auto bits = (reinterpret_cast<typename Simd<Arch::kLanes>::Word>(shifted) << 23) + 0x3f800000;
  return p * reinterpret_cast<Vector<Arch>>(bits);
}

// 1 / x for x of at most 2^126, relative error at most 2e-7. On AVX-512 without a division, which takes longer.
template <class Arch>
RTP_MM_INLINE Vector<Arch> rough_reciprocal(Vector<Arch> x) {
#ifdef __x86_64__
  if constexpr (Arch::kIsAvx512) {
    Vector<Arch> y;
    asm("vrcp14ps %1, %0" : "=v"(y) : "v"(x));
    return y + y * (1.0f - x * y);
  }
#endif
  return 1.0f / x;
}

// x / (1 + e^-(slope x)): SiLU with slope 1, quick GELU with slope 1.702. A rough one's relative error is at most 3e-6
// from -20 on.
template <class Arch, bool kIsRough>
RTP_MM_INLINE Vector<Arch> sigmoid_gate(Vector<Arch> x, float slope) {
  if constexpr (kIsRough) {
    const Vector<Arch> power = x * (slope * -1.44269504f), high = Vector<Arch>{} + 126.0f;
    return x * rough_reciprocal<Arch>(1.0f + exp2<Arch, false>(power > high ? high : power));
  } else {
    return x / (1.0f + exp<Arch>(x * -slope));
  }
}

// x Phi(x), error at most 3.5e-7 |x|, with Phi(-y) = e^(-y^2 / 2) q(1 / (1 + 0.3 y)) for y >= 0: no cancellation in the
// lower tail. A rough one, with Phi(-y) = 2^q(y), divides nothing; its relative error is at most 5e-6 from -4
// on, and for smaller x its error at most 1e-9 or 2^-126 |x|.
template <class Arch, bool kIsRough>
RTP_MM_INLINE Vector<Arch> gelu(Vector<Arch> x) {
  const Vector<Arch> y = x < 0.0f ? -x : x;
  Vector<Arch> tail;
  if constexpr (kIsRough) {
    // Minimax on 0 <= y <= 4 among those that are -1 at 0, looser up to 6.5, and falling from there on.
    tail = exp2<Arch, false>(polynomial<Arch>(y, -1.0401677e-6f, 4.9234273e-5f, -8.5551594e-4f, 8.2838368e-3f,
                                              -5.361798e-2f, -4.5871466e-1f, -1.151179f, -1.0f));
  } else {
    const Vector<Arch> t = 1.0f / (1.0f + 0.3f * y);
    // Minimax on 0 <= y <= 13, relative error 5.7e-8.
    const Vector<Arch> q = polynomial<Arch>(t, 3.8270980e-2f, -1.6864341e-1f, 2.2757773e-1f, -7.5265193e-2f,
                                            1.4167526e-1f, 9.5051230e-2f, 1.2182586e-1f, 1.1950100e-1f, 6.3828902e-6f);
    tail = q * exp<Arch>(y * y * -0.5f);
  }
  return (x < 0.0f ? Vector<Arch>{} : x) - y * tail;
}

}  // namespace rtp_mm
