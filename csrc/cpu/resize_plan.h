#pragma once

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

// Everything that one pass depends on.
struct ResizeAxis {
  std::vector<OutputTaps> outputs;  // rounded up to a multiple of 4; those past the end repeat the last
  std::vector<QuadTaps> taps;
  std::vector<OutputRun> runs;
  int64_t most_quads;  // that one output touches, those that its mask leaves out included
  int64_t span;        // quads from the first that an output or a later one needs, to the last so far
};

// The last quad that an output needs.
inline int64_t last_quad(const OutputTaps& output) { return output.first + output.count - (output.mask == ~0u); }

// From a cache of the process, bounded in bytes; the least recently used goes first. An axis that is not resized has
// one tap of 1, which changes no byte.
std::shared_ptr<const ResizeAxis> resize_axis(int64_t size, int64_t out_size, ResizeFilter filter, ResizeLevel level);

const ResizeKernels& resize_kernels(ResizeLevel level);

}  // namespace rtp_mm
