#include "cpu/png_rows.h"

#include <cstring>
#include <vector>

#include "cpu/isa.h"

// Only inlined functions take vectors.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace rtp_mm {
namespace {

enum Filter : uint8_t { kNone, kSub, kUp, kAverage, kPaeth, kFilters };

// A pixel's bytes, widened, in the first lanes: bytes depend on their left neighbours, so only a pixel's own bytes can
// be computed side by side.
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint8_t EightBytes __attribute__((vector_size(8)));
typedef uint32_t TwoWords __attribute__((vector_size(8)));
typedef int16_t Pixel __attribute__((vector_size(16)));

// The first eight bytes, each with a zero behind it. On ARM gcc 12 would convert them one at a time.
RTP_MM_INLINE Pixel widened(const Bytes& bytes) {
#ifdef __clang__
  const Bytes pairs = __builtin_shufflevector(bytes, Bytes{}, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
  const Bytes pairs = __builtin_shuffle(bytes, Bytes{}, Bytes{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
#endif
  return reinterpret_cast<Pixel>(pairs);
}

// By way of a general register: a copy of three bytes to a vector in memory stalls the load that follows.
template <int kBytes>
RTP_MM_INLINE Pixel load(const uint8_t* p) {
  uint32_t word = 0;
  if constexpr (kBytes == 3) {
    uint16_t low;
    std::memcpy(&low, p, 2);
    word = low | uint32_t{p[2]} << 16;
  } else {
    std::memcpy(&word, p, kBytes);
  }
  return widened(reinterpret_cast<Bytes>(Words{word}));
}

template <int kBytes>
RTP_MM_INLINE void store(const Pixel& pixel, uint8_t* p) {
  const uint32_t word = reinterpret_cast<TwoWords>(__builtin_convertvector(pixel, EightBytes))[0];
  if constexpr (kBytes == 3) {
    const uint16_t low = word;
    std::memcpy(p, &low, 2);
    p[2] = word >> 16;
  } else {
    std::memcpy(p, &word, kBytes);
  }
}

RTP_MM_INLINE Pixel magnitude(const Pixel& x) { return x > -x ? x : -x; }

// What a filter guesses from the pixels to the left, above, and above to the left.
RTP_MM_INLINE Pixel guess_sub(const Pixel& left, const Pixel&, const Pixel&) { return left; }

RTP_MM_INLINE Pixel guess_average(const Pixel& left, const Pixel& above, const Pixel&) { return (left + above) >> 1; }

RTP_MM_INLINE Pixel guess_paeth(const Pixel& left, const Pixel& above, const Pixel& corner) {
  const Pixel to_left = above - corner, to_above = left - corner;
  const Pixel p = magnitude(to_left), q = magnitude(to_above), r = magnitude(to_left + to_above);
  const Pixel other = q <= r ? above : corner;
  return (p <= q) & (p <= r) ? left : other;
}

template <int kBytes, Pixel (*kGuess)(const Pixel&, const Pixel&, const Pixel&)>
void unfilter_row(const uint8_t* filtered, const uint8_t* above_row, int64_t row_bytes, uint8_t* row) {
  Pixel left{}, corner{};
  for (int64_t x = 0; x < row_bytes; x += kBytes) {
    const Pixel above = load<kBytes>(above_row + x);
    left = (load<kBytes>(filtered + x) + kGuess(left, above, corner)) & 255;
    corner = above;
    store<kBytes>(left, row + x);
  }
}

template <int kBytes>
void unfilter(const uint8_t* filtered, int64_t height, int64_t row_bytes, uint8_t* rows) {
  const std::vector<uint8_t> zeros(row_bytes);
  const uint8_t* above = zeros.data();
  for (int64_t y = 0; y < height; ++y, filtered += row_bytes, rows += row_bytes) {
    switch (*filtered++) {
      case kNone:
        std::memcpy(rows, filtered, row_bytes);
        break;
      case kSub:
        unfilter_row<kBytes, guess_sub>(filtered, above, row_bytes, rows);
        break;
      case kUp:
        for (int64_t x = 0; x < row_bytes; ++x) rows[x] = filtered[x] + above[x];
        break;
      case kAverage:
        unfilter_row<kBytes, guess_average>(filtered, above, row_bytes, rows);
        break;
      default:
        unfilter_row<kBytes, guess_paeth>(filtered, above, row_bytes, rows);
    }
    above = rows;
  }
}

}  // namespace

bool unfilter_png(const uint8_t* filtered, int64_t height, int64_t row_bytes, int64_t pixel_bytes, uint8_t* rows) {
  for (int64_t y = 0; y < height; ++y) {
    if (filtered[y * (row_bytes + 1)] >= kFilters) return false;
  }
  constexpr decltype(&unfilter<1>) kUnfilter[] = {unfilter<1>, unfilter<2>, unfilter<3>, unfilter<4>};
  kUnfilter[pixel_bytes - 1](filtered, height, row_bytes, rows);
  return true;
}

}  // namespace rtp_mm
