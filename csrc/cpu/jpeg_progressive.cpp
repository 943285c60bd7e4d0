#include "cpu/jpeg_progressive.h"

#include <algorithm>
#include <array>
#include <bit>

#include "cpu/jpeg_scan.h"

namespace rtp_mm {
namespace {

constexpr int kMostAc = 1023;  // which 8-bit samples cannot reach

// Sets of a block's coefficients, the first one on top: so lie the bits that they are told by.
constexpr uint64_t kFirst = uint64_t{1} << 63;

constexpr uint64_t coefficients(int first, int last) { return ~uint64_t{0} >> first & ~uint64_t{0} << (63 - last); }

// The lowest bits, one for each of the mask's, to its places.
template <class Arch>
RTP_MM_INLINE uint64_t deposit(uint64_t bits, uint64_t mask) {
  uint64_t deposited = 0;
#ifdef __x86_64__
  if constexpr (Arch::kLanes > 4) {  // a loop would be mispredicted nearly always
    asm("pdep %2, %1, %0" : "=r"(deposited) : "r"(bits), "r"(mask));
    return deposited;
  }
#endif
  for (; mask; mask &= mask - 1, bits >>= 1) deposited |= bits & 1 ? mask & -mask : 0;
  return deposited;
}

// How the blocks of a scan are read, one after the other, from where a segment begins. False for what is broken.
// `known`: which coefficients but the first are not 0.

struct ReadDc {
  std::array<int, 3> predictions{};

  RTP_MM_INLINE bool operator()(const JpegScan& scan, int component, JpegBits& bits, int16_t* block, uint64_t&) {
    if (scan.high == 0) {
      bits.refill();
      return read_dc(bits, *scan.dc[component], scan.low, predictions[component], block);
    }
    block[0] = static_cast<int16_t>(block[0] | bits.bit() << scan.low);
    return true;
  }
};

// The highest bits of coefficients.
struct ReadAc {
  int ended = 0;  // blocks from here on that have none

  RTP_MM_INLINE bool operator()(const JpegScan& scan, int component, JpegBits& bits, int16_t* block, uint64_t& known) {
    if (ended > 0) {
      --ended;
      return true;
    }
    for (int place = scan.first - 1; place < scan.last;) {
      bits.refill();
      const JpegSymbol symbol = next_symbol(bits, *scan.ac[component]);
      if (symbol.advance == JpegSymbol::kEndOfBlock) {
        ended = symbol.value - 1;
        return true;
      }
      place += symbol.advance;
      const int value = symbol.value * (1 << scan.low);
      if (place > scan.last || value < -kMostAc || value > kMostAc) return false;
      block[kQuadPlaces[place]] = static_cast<int16_t>(value);
      if (value != 0) known |= kFirst >> place;
    }
    return true;
  }
};

// One bit more of coefficients. Those that are known get theirs on the way to the next that will be.
template <class Arch>
struct RefineAc {
  int ended = 0;

  RTP_MM_INLINE bool operator()(const JpegScan& scan, int component, JpegBits& bits, int16_t* block, uint64_t& known) {
    const int one = 1 << scan.low;
    const uint64_t to_refine = known & coefficients(scan.first, scan.last);
    uint64_t rest = coefficients(scan.first, scan.last), refined = 0;
    while (ended == 0 && rest != 0) {
      bits.refill();
      const JpegSymbol symbol = next_symbol(bits, *scan.ac[component]);
      if (symbol.advance == JpegSymbol::kEndOfBlock) {
        ended = symbol.value;
        break;
      }
      const uint64_t unknown = rest & ~known;
      const int behind = std::popcount(unknown) - symbol.advance;  // the one that is told
      if (behind < 0 || symbol.value < -1 || symbol.value > 1) return false;
      const uint64_t told = deposit<Arch>(uint64_t{1} << behind, unknown);
      refined |= take(bits, to_refine & rest & ~(told | (told - 1)));
      block[kQuadPlaces[std::countl_zero(told)]] = static_cast<int16_t>(symbol.value * one);
      if (symbol.value != 0) known |= told;
      rest &= told - 1;
    }
    if (ended > 0) {
      --ended;
      bits.refill();
      refined |= take(bits, to_refine & rest);
    }
    for (; refined; refined &= refined - 1) {
      int16_t& coefficient = block[kQuadPlaces[63 - std::countr_zero(refined)]];
      coefficient = static_cast<int16_t>(coefficient + (coefficient < 0 ? -one : one));
    }
    return true;
  }

 private:
  // A bit for each of these: where it is 1. As many as a symbol leaves of a refill, or less, at once.
  RTP_MM_INLINE static uint64_t take(JpegBits& bits, uint64_t places) {
    constexpr uint64_t kLower = 0xffffffff;
    uint64_t refined = 0;
    if (std::popcount(places) > 32) [[unlikely]] {
      refined = take_at_once(bits, places & ~kLower);
      bits.refill();
      places &= kLower;
    }
    return refined | take_at_once(bits, places);
  }

  RTP_MM_INLINE static uint64_t take_at_once(JpegBits& bits, uint64_t places) {
    const int count = std::popcount(places);
    const uint64_t refined = deposit<Arch>(bits.peek() >> 1 >> (63 - count), places);
    bits.skip(count);
    return refined;
  }
};

}  // namespace

struct ReadScan {
  template <class Arch>
  RTP_MM_INLINE static void run(const JpegFile* file, const JpegScan* scan, JpegCoefficients* coefficients) {
    if (scan->first == 0) {
      read<ReadDc>(*file, *scan, *coefficients);
    } else if (scan->high == 0) {
      read<ReadAc>(*file, *scan, *coefficients);
    } else {
      read<RefineAc<Arch>>(*file, *scan, *coefficients);
    }
  }

 private:
  template <class ReadBlock>
  RTP_MM_INLINE static void read(const JpegFile& file, const JpegScan& scan, JpegCoefficients& coefficients) {
    const bool is_single = scan.count == 1;
    const JpegCoefficients::Plane& first = coefficients.planes_[scan.component];
    const int64_t rows = is_single ? first.lines : file.mcus_down,
                  columns = is_single ? first.columns : file.mcus_across;
    JpegScanReader reader(file, scan, rows * columns);
    ReadBlock read_block;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        if (reader.next_mcu()) read_block = {};
        JpegBits bits = reader.bits;  // in registers
        bool is_valid = true;
        for (int c = scan.component; c < scan.component + scan.count; ++c) {
          JpegCoefficients::Plane& plane = coefficients.planes_[c];
          const int64_t down = is_single ? 1 : plane.down, across = is_single ? 1 : plane.across;
          for (int64_t y = row * down; y < (row + 1) * down; ++y) {
            for (int64_t x = column * across; x < (column + 1) * across; ++x) {
              is_valid &= read_block(scan, c, bits, plane.block(y, x), plane.known_of(y, x));
            }
          }
        }
        reader.bits = bits;
        require(is_valid && reader.is_within());
      }
    }
    reader.finish();
  }
};

JpegCoefficients::JpegCoefficients(const JpegFile& file, Isa isa) : planes_(file.components()) {
  for (int c = 0; c < file.components(); ++c) {
    const bool is_luma = c == 0;
    const int64_t width = is_luma ? file.width : (file.width + file.across - 1) / file.across;
    const int64_t height = is_luma ? file.height : (file.height + file.down - 1) / file.down;
    Plane& plane = planes_[c];
    plane.across = is_luma ? file.across : 1;
    plane.down = is_luma ? file.down : 1;
    plane.columns = (width + 7) / 8;
    plane.lines = (height + 7) / 8;
    // As many as are decoded: a whole number of quads of MCUs.
    plane.quads = (file.mcus_across + kQuadBlocks - 1) / kQuadBlocks * plane.across;
    plane.values.resize(file.mcus_down * plane.down * plane.quads);
    plane.known.resize(plane.values.size() * kQuadBlocks);
  }
  for (const JpegScan& scan : file.scans) rtp_mm::run<ReadScan>(isa, &file, &scan, this);
}

}  // namespace rtp_mm
