// The inner loops of every matrix product: strips of a few rows, their sums held in registers, times a panel of
// columns.

#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/float_formats.h"
#include "cpu/isa.h"

namespace rtp_mm {

// Steps of k in one strip. Longer sums are sums of such partial sums, which round less. 96 to 256 are equally fast; a
// panel of 64 columns takes 32 KB, and a row of one attention head is one strip.
constexpr int64_t kStripDepth = 128;

// Columns come in multiples of this: a vector of the widest instruction set.
constexpr int64_t kColumnUnit = 16;

// The side of AMX's tiles, in rows and in words. What they multiply (see `AmxProduct`) has zeros up to a depth that
// is a multiple of it.
constexpr int64_t kAmxSide = 16;

constexpr int64_t up_to_multiple(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Memory that is wanted soon: fetched into L2 while a product runs.
struct Ahead {
  const void* data = nullptr;
  int64_t bytes = 0;
};

// Four bytes that are consecutive in k: int8 of a weight, or uint8 of what it multiplies. Their products are added to
// an int32, exactly, and in all else such a word stands where a float does.
using FourBytes = int32_t;

// What products of words are added to.
template <class Word>
using Sum = std::conditional_t<std::is_same_v<Word, FourBytes>, int32_t, float>;

// The right operand and the result of sums[rows, columns] = left[rows, depth] * panel[depth, columns]; with is_added,
// sums += that. Each element is summed over the depth in order, whatever the other rows and columns. Word: float,
// FourBytes or BFloat16Pair.
template <class Word>
struct Product {
  int64_t rows, columns, depth;  // depth in words
  const Word* panel;
  int64_t panel_stride;
  Sum<Word>* sums;
  int64_t sums_stride;
  bool is_added;
};

// left: rows kStripDepth apart, depth <= kStripDepth.
void multiply(Isa isa, const float* left, const Product<float>& product, Ahead ahead = {});
void multiply(Isa isa, const FourBytes* left, const Product<FourBytes>& product, Ahead ahead = {});
void multiply(Isa isa, const BFloat16Pair* left, const Product<BFloat16Pair>& product, Ahead ahead = {});

// left[depth, rows], rows of memory left_stride apart.
void multiply_transposed(Isa isa, const float* left, int64_t left_stride, const Product<float>& product);
void multiply_transposed(Isa isa, const BFloat16Pair* left, int64_t left_stride, const Product<BFloat16Pair>& product);

}  // namespace rtp_mm
