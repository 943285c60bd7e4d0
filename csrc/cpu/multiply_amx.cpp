#include "cpu/multiply_amx.h"

#ifdef __x86_64__

#include <type_traits>

namespace rtp_mm {
namespace {

constexpr int64_t kWordBytes = sizeof(int32_t);

// What LDTILECFG reads: all eight tiles are whole ones.
struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr Configuration kConfiguration;

// Tiles are named in the assembler alone: no compiler uses them for anything else.
template <int kTile>
RTP_MM_INLINE void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
RTP_MM_INLINE void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
RTP_MM_INLINE void clear() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

template <class Word, int kSum, int kLeft, int kRight>
RTP_MM_INLINE void multiply_add() {
  if constexpr (std::is_same_v<Word, FourBytes>) {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
  } else {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
  }
}

// Tiles 0 to 3 hold sums, 4 and 5 those of the left operand, 6 and 7 the panel's: a square of two by two needs each
// that it loads twice.
template <class Word>
struct MultiplyAmx {
  const Product<Word>& p;
  const Word* left;
  const int64_t left_stride;

  template <class F>
  RTP_MM_INLINE static void each_sum(Sum<Word>* sums, int64_t stride, const F& f) {
    f.template operator()<0>(sums);
    f.template operator()<1>(sums + kAmxSide);
    f.template operator()<2>(sums + kAmxSide * stride);
    f.template operator()<3>(sums + kAmxSide * (stride + 1));
  }

  // kRows by kColumns tiles from that row and column on. Prefetches `lines` lines at a step of the depth.
  template <int kRows, int kColumns>
  RTP_MM_INLINE void block(int64_t row, int64_t column, const char* ahead, int64_t lines) const {
    const int64_t left_bytes = left_stride * kWordBytes, panel_bytes = p.panel_stride * kWordBytes,
                  sums_bytes = p.sums_stride * kWordBytes;
    Sum<Word>* sums = p.sums + row * p.sums_stride + column;
    const auto is_ours = [](int tile) { return tile / 2 < kRows && tile % 2 < kColumns; };
    each_sum(sums, p.sums_stride, [&]<int kTile>(const Sum<Word>* at) {
      if constexpr (!is_ours(kTile)) return;
      if (p.is_added) {
        load<kTile>(at, sums_bytes);
      } else {
        clear<kTile>();
      }
    });
    const Word *a = left + row * left_stride, *b = p.panel + column;
    for (int64_t i = 0; i < p.depth; i += kAmxSide, a += kAmxSide, b += kAmxSide * p.panel_stride) {
      for (int64_t line = 0; line < lines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
      load<4>(a, left_bytes);
      load<6>(b, panel_bytes);
      multiply_add<Word, 0, 4, 6>();
      if constexpr (kColumns == 2) {
        load<7>(b + kAmxSide, panel_bytes);
        multiply_add<Word, 1, 4, 7>();
      }
      if constexpr (kRows == 2) {
        load<5>(a + kAmxSide * left_stride, left_bytes);
        multiply_add<Word, 2, 5, 6>();
        if constexpr (kColumns == 2) multiply_add<Word, 3, 5, 7>();
      }
    }
    each_sum(sums, p.sums_stride, [&]<int kTile>(Sum<Word>* at) {
      if constexpr (is_ours(kTile)) store<kTile>(at, sums_bytes);
    });
  }

  template <int kRows>
  RTP_MM_INLINE void rows(int64_t row, const char* ahead, int64_t lines) const {
    const int64_t steps = p.depth / kAmxSide;
    int64_t column = 0;
    for (; column + 2 * kAmxSide <= p.columns; column += 2 * kAmxSide, ahead += steps * lines * 64) {
      block<kRows, 2>(row, column, ahead, lines);
    }
    if (column < p.columns) block<kRows, 1>(row, column, ahead, lines);
  }

  void run(Ahead ahead) const {
    const int64_t tile_rows = (p.rows + kAmxSide - 1) / kAmxSide, tile_columns = p.columns / kAmxSide;
    const int64_t steps = (tile_rows + 1) / 2 * ((tile_columns + 1) / 2) * (p.depth / kAmxSide);
    const int64_t lines = ahead.data ? (ahead.bytes / 64 + steps - 1) / steps : 0;
    const auto* next = static_cast<const char*>(ahead.data);
    const int64_t bytes_a_row = (tile_columns + 1) / 2 * (p.depth / kAmxSide) * lines * 64;
    int64_t tile = 0;
    for (; tile + 2 <= tile_rows; tile += 2, next += bytes_a_row) rows<2>(tile * kAmxSide, next, lines);
    if (tile < tile_rows) rows<1>(tile * kAmxSide, next, lines);
  }
};

}  // namespace

AmxTiles::AmxTiles(bool is_used) : is_used_(is_used) {
  if (is_used_) asm volatile("ldtilecfg %0" : : "m"(kConfiguration));
}

AmxTiles::~AmxTiles() {
  if (is_used_) asm volatile("tilerelease");
}

void multiply_amx(const FourBytes* left, int64_t left_stride, const Product<FourBytes>& product, Ahead ahead) {
  MultiplyAmx<FourBytes>{product, left, left_stride}.run(ahead);
}

void multiply_amx(const BFloat16Pair* left, int64_t left_stride, const Product<BFloat16Pair>& product, Ahead ahead) {
  MultiplyAmx<BFloat16Pair>{product, left, left_stride}.run(ahead);
}

}  // namespace rtp_mm

#else

namespace rtp_mm {

AmxTiles::AmxTiles(bool) : is_used_(false) {}
AmxTiles::~AmxTiles() {}
void multiply_amx(const FourBytes*, int64_t, const Product<FourBytes>&, Ahead) {}
void multiply_amx(const BFloat16Pair*, int64_t, const Product<BFloat16Pair>&, Ahead) {}

}  // namespace rtp_mm

#endif
