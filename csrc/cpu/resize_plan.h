#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/resize.h"
#include "cpu/resize_kernels.h"

namespace rtp_mm {

// A run of outputs whose taps are few enough quads to stay in L1.
struct OutputRun {
  int64_t begin, end;            // outputs, multiples of 4
  int64_t first_quad, end_quad;  // that they need
};

struct QuadRange {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// Everything that one pass depends on.
struct ResizeAxis {
  std::vector<OutputTaps> outputs;  // rounded up to a multiple of 4; those past the end repeat the last
  std::vector<QuadTaps> taps;
  std::vector<OutputRun> runs;
  std::vector<OutputBlock> blocks;  // none where the level has no use for them, or the taps are too far apart
  std::vector<BlockTaps> block_taps;
  std::vector<QuadRange> needed;  // by each output: from the first that it or a later one needs to the last so far

  // By outputs [begin, end).
  QuadRange needed_by(int64_t begin, int64_t end) const { return {needed[begin].begin, needed[end - 1].end}; }

  // The most that `count` outputs need, from a multiple of `count` on.
  int64_t span(int64_t count) const {
    int64_t most = 0;
    for (int64_t i = 0, size = static_cast<int64_t>(needed.size()); i < size; i += count) {
      most = std::max(most, needed_by(i, std::min(i + count, size)).size());
    }
    return most;
  }
};

// The quads that an output needs.
inline QuadRange quads_of(const OutputTaps& output) {
  return {output.first, output.first + output.count + (output.mask != ~0u)};
}

// From a cache of the process, bounded in bytes; the least recently used goes first. An axis that is not resized has
// one tap of 1, which changes no byte. Only a horizontal one has blocks.
std::shared_ptr<const ResizeAxis> resize_axis(int64_t size, int64_t out_size, bool is_horizontal, ResizeFilter filter,
                                              ResizeLevel level);

const ResizeKernels& resize_kernels(ResizeLevel level);

}  // namespace rtp_mm
