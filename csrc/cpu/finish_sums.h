// What becomes of the sums of a linear layer: bias and activation, and the way to where they belong in the output.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/activation.h"
#include "cpu/multiply_amx.h"
#include "cpu/simd.h"

namespace rtp_mm {

// Of the weight's rows that stand in the columns of some panels; 0 for columns past the end.
struct ColumnFactors {
  const float *bias, *scales;  // scales and offsets: of bytes only
  const int32_t* offsets;
};

// Sums of whole panels, and the columns of the output that they are for. The output may be cut into blocks of columns.
template <class Out>
struct PendingSums {
  float* sums;  // [rows, panels * panel], rows sums_stride apart; they are overwritten
  int64_t sums_stride;
  int64_t rows, panels, panel;
  ColumnFactors factors;
  const float* row_scales;  // of bytes only
  Activation activation;
  bool is_added;  // to the output
  Out* out;       // the first row's first column
  int64_t out_stride;
  int64_t columns;
  int64_t first_columns;  // those of the block that `out` lies in, at most
  int64_t block_width;
  int64_t block_gap;  // from a block's end in one row to the next block's beginning in the same
};

// Row by row, with two steps of the product beside in each.
template <bool kIsBytes>
struct FinishSums {
  static constexpr int64_t kRowsWrittenAhead = 4;  // each is in a page of its own, where no hardware looks ahead

  template <class Arch, class Out, class Beside>
  RTP_MM_INLINE static void run(PendingSums<Out> f, Beside* beside) {
    for (int64_t r = 0; r < f.rows; ++r, f.sums += f.sums_stride, f.out += f.out_stride) {
      beside->step();
      if constexpr (kIsBytes) scale<Arch>(f, f.row_scales[r]);
      activate<Arch>(f);
      beside->step();
      const float* sums = f.sums;
      Out* out = f.out;
      int64_t count = std::min(f.first_columns, f.columns);
      for (int64_t left = f.columns; left > 0; left -= count, count = std::min(f.block_width, left)) {
        // Beside a product to wait for the output costs nothing, and to fetch it early would delay the product's loads.
        if (std::is_same_v<Beside, NoProduct> && r + kRowsWrittenAhead < f.rows) {
          prefetch_to_write(out + kRowsWrittenAhead * f.out_stride, count);
        }
        write<Wide<Arch, Out>>(sums, count, f.is_added, out);
        sums += count, out += count + f.block_gap;
      }
    }
    beside->finish();
  }

  // Sums of bytes to the products that they stand for: the bytes of x are 128 above what they mean.
  template <class Arch, class Out>
  RTP_MM_INLINE static void scale(const PendingSums<Out>& f, float row_scale) {
    for (int64_t j = 0; j < f.panels * f.panel; j += Arch::kLanes) {
      const IntVector<Arch> exact = reinterpret_cast<IntVector<Arch>&>(f.sums[j]) - at<Arch>(f.factors.offsets + j);
      at<Arch>(f.sums + j) =
          __builtin_convertvector(exact, Vector<Arch>) * (at<Arch>(f.factors.scales + j) * row_scale);
    }
  }

  // To values in the output's order. A loop for each activation, so that each has the registers for itself.
  template <class Arch, class Out>
  RTP_MM_INLINE static void activate(const PendingSums<Out>& f) {
    switch (f.activation) {
      case Activation::kNone:
        return activate<Arch, Activation::kNone>(f);
      case Activation::kGelu:
        return activate<Arch, Activation::kGelu>(f);
      case Activation::kQuickGelu:
        return activate<Arch, Activation::kQuickGelu>(f);
      case Activation::kSiluGate:
        return gate<Arch>(f);
    }
  }

  template <class Arch, Activation kActivation, class Out>
  RTP_MM_INLINE static void activate(const PendingSums<Out>& f) {
    for (int64_t j = 0; j < f.panels * f.panel; j += Arch::kLanes) {
      at<Arch>(f.sums + j) = activated<Arch, Out>(at<Arch>(f.sums + j) + at<Arch>(f.factors.bias + j), kActivation);
    }
  }

  template <class Arch, class Out>
  RTP_MM_INLINE static void gate(const PendingSums<Out>& f) {
    float* sums = f.sums;
    const float* bias = f.factors.bias;
    const int64_t half = f.panel / 2;
    for (int64_t p = 0, j = 0; p < f.panels; ++p) {
      for (int64_t gate = p * f.panel; gate < p * f.panel + half; gate += Arch::kLanes, j += Arch::kLanes) {
        const int64_t up = gate + half;
        at<Arch>(sums + j) =  // behind what is read
            silu_gate<Arch, Out>(at<Arch>(sums + gate) + at<Arch>(bias + gate),
                                 at<Arch>(sums + up) + at<Arch>(bias + up));
      }
    }
  }

  template <class Out>
  RTP_MM_INLINE static void prefetch_to_write(const Out* out, int64_t count) {
    for (int64_t j = 0; j < count; j += 64 / sizeof(Out)) __builtin_prefetch(out + j, 1, 3);
  }

  template <class Lanes, class Out>
  RTP_MM_INLINE static void write(const float* sums, int64_t count, bool is_added, Out* out) {
    int64_t j = 0;
    for (; j + Lanes::kLanes <= count; j += Lanes::kLanes) {
      const Vector<Lanes> sum = at<Lanes>(sums + j);
      narrow<Lanes>(is_added ? widened<Lanes>(out + j) + sum : sum, out + j);
    }
    for (; j < count; ++j) narrow(is_added ? widened(out[j]) + sums[j] : sums[j], out + j);
  }
};

}  // namespace rtp_mm
