// The inner loops of the resize, which is what the instruction sets differ in.
//
// Bytes are multiplied in quads: a dword holds the same column of four consecutive rows, or the same row of four
// consecutive columns, so one multiply-add takes four taps in each of its lanes. The taps of an output are the same in
// all lanes: the horizontal pass has 16 rows side by side, the vertical pass 16 columns.

#pragma once

#include <cstdint>

#include "cpu/patch_rows.h"
#include "cpu/resize.h"
#include "cpu/resize_windows.h"

namespace rtp_mm {

constexpr int64_t kBlock = 64;     // bytes of a row that the vertical pass takes at once
constexpr int64_t kBandQuads = 4;  // quads of rows in a band
constexpr int64_t kChannels = 3;

// The coefficients of a quad's four bytes, in the form that a level multiplies with.
struct QuadTaps {
  int32_t words[4];
};

// Coefficients as three signed bytes each, high * 65536 + middle * 256 + low, a word of the four high ones and so on:
// for instruction sets that multiply bytes.
inline QuadTaps signed_byte_taps(const int32_t* coefficients) {
  uint32_t words[3] = {};
  for (int byte = 0; byte < 4; ++byte) {
    int32_t rest = coefficients[byte];
    for (int limb = 0; limb < 3; ++limb) {
      const auto signed_byte = static_cast<int8_t>(rest);
      words[2 - limb] |= static_cast<uint32_t>(static_cast<uint8_t>(signed_byte)) << (8 * byte);
      rest = (rest - signed_byte) / 256;
    }
  }
  return {{static_cast<int32_t>(words[0]), static_cast<int32_t>(words[1]), static_cast<int32_t>(words[2]), 0}};
}

// How one output column or row comes about: from `count` quads and as many QuadTaps.
struct OutputTaps {
  int32_t first;  // quad that holds the first tap
  int32_t count;
  // Taps rarely start at a quad's first byte, so they touch up to count + 1 quads. The bytes of quad `first` ahead of
  // them are free then, and bytes of quad `first + count` stand in: where the mask is 0.
  uint32_t mask;
  int32_t taps;  // index of its first QuadTaps
};

// How 16 output columns come about, from rows of packed RGB: for instruction sets that find any bytes of a vector. Of
// the 64 bytes from pixel `first` on, `places` has for each channel and output those of its first four taps; those of
// the next four are as far from pixel `first + 4`.
struct alignas(64) OutputBlock {
  uint8_t places[kChannels][64];
  int64_t first;
  int64_t count;  // quads of taps
  int64_t taps;   // index of its first BlockTaps
};

// The coefficients of a quad of taps as signed_byte_taps has them, side by side for 16 outputs.
struct alignas(64) BlockTaps {
  int32_t words[3][16];
};

// How many quads each of four outputs comes from, or 0 if they differ.
inline int32_t common_count(const OutputTaps* outputs) {
  const int32_t count = outputs[0].count;
  return count == outputs[1].count && count == outputs[2].count && count == outputs[3].count ? count : 0;
}

// Byte i of a row stands at this dword among its quads: the order in which unpack instructions leave 64 bytes, and
// pack instructions put them together again.
constexpr int64_t quad_place(int64_t i) { return (i & ~63) | (i >> 2 & 3) << 4 | (i >> 4 & 3) << 2 | (i & 3); }

// Quads of rows in planes of channels: value (quad q, byte i of a row) at `quads[q * stride + quad_place(i)]`.
struct QuadRows {
  uint32_t* quads;
  int64_t stride;  // dwords
  int64_t plane;   // bytes of a row from one channel to the next, whole blocks
};

// Memory that is needed next, `runs` runs of `bytes`, fetched evenly over the `steps` of a computation, which takes
// about as long as the memory does.
class Ahead {
 public:
  enum Use { kRead, kWrite };

  Ahead() = default;
  Ahead(Use use, const uint8_t* start, int64_t bytes, int64_t stride, int64_t runs, int64_t steps)
      : use_(use),
        run_(start),
        bytes_(bytes),
        stride_(stride),
        lines_(runs * ((bytes + kLine - 1) / kLine)),
        steps_(steps) {}

  void step() {
    for (due_ += lines_; due_ >= steps_; due_ -= steps_) {
      if (use_ == kWrite) {
        __builtin_prefetch(run_ + offset_, 1);
      } else {
        __builtin_prefetch(run_ + offset_, 0, 2);  // to L2: there is as much of it as fits in L1
      }
      offset_ += kLine;
      if (offset_ >= bytes_) {
        offset_ = 0;
        run_ += stride_;
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  Use use_ = kRead;
  const uint8_t* run_ = nullptr;
  int64_t offset_ = 0, bytes_ = 0, stride_ = 0, lines_ = 0, steps_ = 1, due_ = 0;
};

// All pointers to dwords and to rows that are written are aligned to 64 bytes.
struct ResizeKernels {
  QuadTaps (*encode)(const int32_t* coefficients);

  // 16 rows of pixels to columns [quads][channel][row]: dwords of four consecutive pixels. Reads up to 16 bytes past
  // the last pixel of every row.
  void (*gather_columns)(const uint8_t* pixels, int64_t row_stride, int64_t pixel_stride, int64_t quads,
                         uint32_t* columns);

  // Outputs [begin, end), multiples of 4, of 16 rows; `columns` starts at quad `first`. A step of `ahead` for each
  // four.
  void (*horizontal)(const uint32_t* columns, int64_t first, const OutputTaps* outputs, const QuadTaps* taps,
                     int64_t begin, int64_t end, QuadRows dst, Ahead& ahead);

  // Instead of both, where there is one and the axis has blocks: `count` blocks of 16 rows of packed RGB. Reads up to
  // 64 bytes from the last pixel of every row on.
  void (*horizontal_blocks)(const uint8_t* pixels, int64_t row_stride, const OutputBlock* blocks, int64_t count,
                            const BlockTaps* taps, QuadRows dst);

  // Four rows of bytes to one quad of rows. Reads and writes whole blocks.
  void (*interleave)(const uint8_t* rows, int64_t row_stride, int64_t blocks, uint32_t* quads);

  // One output row; `quads[i]` are the rows of quad `output.first + i`. A step of `ahead` for each block.
  void (*vertical)(const uint32_t* const* quads, const OutputTaps& output, const QuadTaps* taps, int64_t blocks,
                   uint8_t* row, Ahead& ahead);

  // The inverse of interleave.
  void (*separate)(const uint32_t* quads, int64_t blocks, uint8_t* rows, int64_t row_stride);

  // cut_patches.
  void (*cut)(const uint8_t* lines, int64_t line, int64_t channel, PatchWalk walk);
};

extern const ResizeKernels kResizePortable;
#ifdef __x86_64__
extern const ResizeKernels kResizeAvx2;
extern const ResizeKernels kResizeAvx512Vnni;
extern const ResizeKernels kResizeAvx512Vbmi;
#endif
#ifdef __aarch64__
extern const ResizeKernels kResizeNeonI8mm;
#endif

}  // namespace rtp_mm
