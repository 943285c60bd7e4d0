#pragma once

#include <cstdint>

#include "cpu/float_formats.h"
#include "cpu/isa.h"

namespace rtp_mm {

// softmax(rotate(q) @ rotate(k).T / sqrt(dim)) @ v within each segment and head. Dimension i of q and k is rotated
// together with i + dim / 2. Element: float, or BFloat16, which what is multiplied is rounded to; all else is float32.
template <class Element>
struct PackedAttention {
  const Element* qkv;  // [n, 3, heads, dim] with these strides, and dim contiguous and even
  int64_t row_stride, part_stride, head_stride;
  const float *cos, *sin;     // [n, dim / 2]
  const int32_t* cu_seqlens;  // [segments + 1], ascending from 0
  Element* out;               // [n, heads, dim]
  int64_t segments, heads, dim;
  Isa isa;
  int64_t out_stride = heads * dim;  // from row to row

  // The work is cut into tasks, blocks of queries of one head of one segment, in the order (segment, head, block).
  int64_t tasks() const;

  // Computes tasks [begin, end). Scores are never held for more than a block of queries by a block of keys; blocks of
  // keys begin with the segment, so a row's bits depend on its own segment alone.
  void run(int64_t begin, int64_t end) const;
};

constexpr int64_t kMaxHeadDim = 128;

}  // namespace rtp_mm
