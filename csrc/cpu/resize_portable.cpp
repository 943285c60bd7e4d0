// For any compiler and CPU: plain loops over lanes, which the compiler vectorises as it can.

#include <algorithm>
#include <bit>
#include <cstring>

#include "cpu/resize_kernels.h"

namespace rtp_mm {
namespace {

static_assert(std::endian::native == std::endian::little, "a quad's first byte is the lowest of its dword");

QuadTaps encode(const int32_t* coefficients) {
  QuadTaps taps;
  std::copy_n(coefficients, 4, taps.words);
  return taps;
}

// Sixteen lanes of one output; `quad(i)` points to those of quad output.first + i.
template <class Quad>
void dot(const OutputTaps& output, const QuadTaps* taps, Quad quad, uint8_t* bytes) {
  int32_t sums[16];
  std::fill_n(sums, 16, 1 << (kFractionBits - 1));
  for (int32_t i = 0; i < output.count; ++i) {
    const uint32_t* low = quad(i);
    const uint32_t* high = i == 0 ? quad(output.count) : low;
    const uint32_t mask = i == 0 ? output.mask : ~0u;
    const int32_t* w = taps[output.taps + i].words;
    for (int lane = 0; lane < 16; ++lane) {
      const uint32_t v = (low[lane] & mask) | (high[lane] & ~mask);
      for (int byte = 0; byte < 4; ++byte) sums[lane] += w[byte] * static_cast<int32_t>(v >> (8 * byte) & 255);
    }
  }
  for (int lane = 0; lane < 16; ++lane) {
    bytes[lane] = static_cast<uint8_t>(std::clamp(sums[lane] >> kFractionBits, 0, 255));
  }
}

void gather_columns(const uint8_t* pixels, int64_t row_stride, int64_t pixel_stride, int64_t quads, uint32_t* columns) {
  for (int64_t quad = 0; quad < quads; ++quad, pixels += 4 * pixel_stride) {
    for (int64_t channel = 0; channel < kChannels; ++channel, columns += 16) {
      for (int64_t row = 0; row < 16; ++row) {
        const uint8_t* src = pixels + row * row_stride + channel;
        const uint8_t bytes[4] = {src[0], src[pixel_stride], src[2 * pixel_stride], src[3 * pixel_stride]};
        std::memcpy(&columns[row], bytes, 4);
      }
    }
  }
}

void horizontal(const uint32_t* columns, int64_t first, const OutputTaps* outputs, const QuadTaps* taps, int64_t begin,
                int64_t end, QuadRows dst, Ahead&) {
  for (int64_t x = begin; x < end; x += 4) {
    for (int64_t channel = 0; channel < kChannels; ++channel) {
      uint8_t bytes[4][16];
      for (int64_t i = 0; i < 4; ++i) {
        const uint32_t* start = columns + ((outputs[x + i].first - first) * kChannels + channel) * 16;
        dot(outputs[x + i], taps, [&](int64_t quad) { return start + quad * kChannels * 16; }, bytes[i]);
      }
      uint32_t* place = dst.quads + quad_place(channel * dst.plane + x);
      for (int64_t quad = 0; quad < 4; ++quad) {
        for (int64_t i = 0; i < 4; ++i) std::memcpy(place + quad * dst.stride + i, bytes[i] + 4 * quad, 4);
      }
    }
  }
}

void interleave(const uint8_t* rows, int64_t row_stride, int64_t blocks, uint32_t* quads) {
  for (int64_t i = 0; i < blocks * kBlock; ++i) {
    const uint8_t* src = rows + i;
    const uint8_t bytes[4] = {src[0], src[row_stride], src[2 * row_stride], src[3 * row_stride]};
    std::memcpy(&quads[quad_place(i)], bytes, 4);
  }
}

void vertical(const uint32_t* const* quads, const OutputTaps& output, const QuadTaps* taps, int64_t blocks,
              uint8_t* row, Ahead&) {
  for (int64_t i = 0; i < blocks * kBlock; i += 16) {
    uint8_t bytes[16];
    dot(output, taps, [&](int64_t quad) { return quads[quad] + i; }, bytes);
    // vector i / 16 of the block holds dwords 0..3 of four groups of 16 bytes
    for (int64_t group = 0; group < 4; ++group) {
      std::memcpy(row + (i & ~63) + 16 * group + (i & 63) / 4, bytes + 4 * group, 4);
    }
  }
}

void separate(const uint32_t* quads, int64_t blocks, uint8_t* rows, int64_t row_stride) {
  for (int64_t i = 0; i < blocks * kBlock; ++i) {
    const uint32_t quad = quads[quad_place(i)];
    for (int64_t row = 0; row < 4; ++row) rows[row * row_stride + i] = static_cast<uint8_t>(quad >> (8 * row));
  }
}

}  // namespace

const ResizeKernels kResizePortable = {encode,     gather_columns, horizontal, nullptr,
                                       interleave, vertical,       separate,   cut_patches};

}  // namespace rtp_mm
