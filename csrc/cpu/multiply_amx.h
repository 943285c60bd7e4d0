// Matrix products by AMX, whose registers are tiles of 16 rows of 64 bytes.
//
// Source: Intel's Software Developer's Manual, volumes 1 (18: AMX) and 2 (TDPBF16PS, TDPBUSD).

#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/multiply.h"

namespace rtp_mm {

// A thread's tiles, in use while this lives: what products by tiles need around them. Nothing if not `is_used`.
class AmxTiles {
 public:
  explicit AmxTiles(bool is_used);
  ~AmxTiles();
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

 private:
  const bool is_used_;
};

// As `multiply`, with rows of `left` that many words apart, in steps that a caller takes between other work: the tiles
// are busy with a step for some 70 cycles, while vectors go on. One product at a time, to its end. The depth and the
// columns are multiples of kAmxSide, the depth not 0; rows are taken in as many, so `left` must be readable, and `sums`
// have room, up to the next multiple: what stands there is of no importance, and lost. A row of a tile that lies in two
// cache lines is loaded as slowly as two. Bytes are added exactly, bfloat16s in an order of their own: of each 16 words
// the lower halves' products, and the upper ones', are summed from 0 on, both sums added up, and that added to what was
// before.
template <class Word>
class AmxProduct {
 public:
  AmxProduct() = default;  // of no rows

  AmxProduct(const Word* left, int64_t left_stride, const Product<Word>& product, Ahead ahead = {})
      : p_(product), left_(left), left_stride_(left_stride), ahead_(static_cast<const char*>(ahead.data)) {
    const auto squares = [](int64_t size) { return (size + 2 * kAmxSide - 1) / (2 * kAmxSide); };
    const int64_t steps = squares(p_.rows) * squares(p_.columns) * (p_.depth / kAmxSide);
    if (ahead_) lines_ = (ahead.bytes / 64 + steps - 1) / steps;
  }

  // Multiplies two tiles by two, at most; false if nothing was left.
  RTP_MM_INLINE bool step() {
#ifndef __x86_64__
    return false;
#else
    const Place place = place_;
    if (place.row >= p_.rows) return false;
    for (int64_t line = 0; line < lines_; ++line, ahead_ += 64) __builtin_prefetch(ahead_, 0, 2);
    in_shape(place, [&]<int kRows, int kColumns>() __attribute__((always_inline)) { step<kRows, kColumns>(place); });
    return true;
#endif
  }

  RTP_MM_INLINE void finish() {
    while (step()) {
    }
  }

 private:
  // Of a step: where its square of tiles begins, and the words that it multiplies.
  struct Place {
    int64_t row, column, depth;
  };

  RTP_MM_INLINE Place after_square(const Place& place) const {
    if (place.column + 2 * kAmxSide < p_.columns) return {place.row, place.column + 2 * kAmxSide, 0};
    return {place.row + 2 * kAmxSide, 0, 0};
  }

  // f<rows, columns>() with those of the square in tiles.
  template <class F>
  RTP_MM_INLINE void in_shape(const Place& place, const F& f) const {
    const bool has_second_row = place.row + kAmxSide < p_.rows,
               has_second_column = place.column + kAmxSide < p_.columns;
    if (has_second_row) return has_second_column ? f.template operator()<2, 2>() : f.template operator()<2, 1>();
    has_second_column ? f.template operator()<1, 2>() : f.template operator()<1, 1>();
  }

#ifdef __x86_64__
  // Tiles 0 to 3 hold the sums of a square, 4 and 5 what it needs of the left operand, 6 and 7 of the panel: all of
  // them loaded a step before, and before the sums of the last square are stored, so that products do not wait.
  template <int kRows, int kColumns>
  RTP_MM_INLINE void step(Place place) {
    if (!is_begun_) load_operands<kRows, kColumns>(place), is_begun_ = true;
    if (place.depth == 0) begin_sums<kRows, kColumns>(place);
    multiply_add<0, 4, 6>();
    if constexpr (kColumns == 2) multiply_add<1, 4, 7>();
    if constexpr (kRows == 2) multiply_add<2, 5, 6>();
    if constexpr (kRows == 2 && kColumns == 2) multiply_add<3, 5, 7>();
    if (place.depth + kAmxSide < p_.depth) {
      place_.depth = place.depth += kAmxSide;
      return load_operands<kRows, kColumns>(place);
    }
    const Place next = place_ = after_square(place);
    if (next.row < p_.rows) {
      in_shape(next, [&]<int kNextRows, int kNextColumns>()
                         __attribute__((always_inline)) { load_operands<kNextRows, kNextColumns>(next); });
    }
    store_sums<kRows, kColumns>(place);
  }

  // Tiles are named in the assembler alone: no compiler uses them for anything else.
  template <int kTile>
  RTP_MM_INLINE static void load(const Word* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride * kWordBytes), "i"(kTile) : "memory");
  }

  template <int kTile>
  RTP_MM_INLINE static void store(Sum<Word>* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride * kWordBytes), "i"(kTile) : "memory");
  }

  template <int kTile>
  RTP_MM_INLINE static void clear() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }

  template <int kSum, int kLeft, int kRight>
  RTP_MM_INLINE static void multiply_add() {
    if constexpr (std::is_same_v<Word, FourBytes>) {
      asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
    } else {
      asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
    }
  }

  template <int kRows, int kColumns>
  RTP_MM_INLINE void load_operands(const Place& place) const {
    const int64_t left_stride = left_stride_, panel_stride = p_.panel_stride;
    const Word *left = left_ + place.row * left_stride + place.depth,
               *panel = p_.panel + place.depth * panel_stride + place.column;
    load<4>(left, left_stride);
    load<6>(panel, panel_stride);
    if constexpr (kColumns == 2) load<7>(panel + kAmxSide, panel_stride);
    if constexpr (kRows == 2) load<5>(left + kAmxSide * left_stride, left_stride);
  }

  template <int kRows, int kColumns>
  RTP_MM_INLINE void begin_sums(const Place& place) const {
    if (!p_.is_added) return clear<0>(), clear<1>(), clear<2>(), clear<3>();
    const int64_t stride = p_.sums_stride;
    const auto* sums = reinterpret_cast<const Word*>(p_.sums + place.row * stride + place.column);
    load<0>(sums, stride);
    if constexpr (kColumns == 2) load<1>(sums + kAmxSide, stride);
    if constexpr (kRows == 2) load<2>(sums + kAmxSide * stride, stride);
    if constexpr (kRows == 2 && kColumns == 2) load<3>(sums + kAmxSide * (stride + 1), stride);
  }

  template <int kRows, int kColumns>
  RTP_MM_INLINE void store_sums(const Place& place) const {
    const int64_t stride = p_.sums_stride;
    Sum<Word>* sums = p_.sums + place.row * stride + place.column;
    store<0>(sums, stride);
    if constexpr (kColumns == 2) store<1>(sums + kAmxSide, stride);
    if constexpr (kRows == 2) store<2>(sums + kAmxSide * stride, stride);
    if constexpr (kRows == 2 && kColumns == 2) store<3>(sums + kAmxSide * (stride + 1), stride);
  }
#endif

  static constexpr int64_t kWordBytes = sizeof(Word);

  Product<Word> p_{};
  const Word* left_ = nullptr;
  int64_t left_stride_ = 0;
  Place place_{};  // of the next step
  bool is_begun_ = false;
  const char* ahead_ = nullptr;
  int64_t lines_ = 0;  // of `ahead`, to prefetch at a step
};

// Where there is nothing to multiply beside vectors.
struct NoProduct {
  RTP_MM_INLINE void step() {}
  RTP_MM_INLINE void finish() {}
};

}  // namespace rtp_mm
