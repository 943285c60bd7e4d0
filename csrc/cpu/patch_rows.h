#pragma once

#include <cstdint>

#include "merge_order.h"

namespace rtp_mm {

// Patch rows [height/patch * width/patch, 3 * temporal * patch * patch] in merge-block order.
struct PatchRows {
  uint8_t* rows;
  int64_t width;  // pixels
  int64_t patch, merge;
  int64_t temporal, slot;

  int64_t row_bytes() const { return 3 * temporal * patch * patch; }
};

// From patch to patch of one row of them, left to right, from column `begin` to `end`. `patch_row` counts from the
// image's top.
class PatchWalk {
 public:
  PatchWalk(const PatchRows& dst, int64_t patch_row, int64_t begin, int64_t end)
      : dst_(dst),
        end_(end),
        row_(dst.rows + merge_order<int64_t>(patch_row, begin, dst.width / dst.patch, dst.merge) * dst.row_bytes()),
        column_(begin),
        column_in_block_(begin % dst.merge) {}

  const PatchRows& dst() const { return dst_; }
  bool is_done() const { return column_ == end_; }

  // Where a channel of this patch goes.
  uint8_t* patch(int64_t channel) const {
    return row_ + (channel * dst_.temporal + dst_.slot) * dst_.patch * dst_.patch;
  }

  void next() {
    row_ += dst_.row_bytes();
    ++column_;
    if (++column_in_block_ == dst_.merge) {  // the block's other rows lie between
      column_in_block_ = 0;
      row_ += (dst_.merge - 1) * dst_.merge * dst_.row_bytes();
    }
  }

 private:
  const PatchRows& dst_;
  int64_t end_;
  uint8_t* row_;
  int64_t column_, column_in_block_;
};

// Cuts one channel of the patches of `walk` out of as many lines as a patch has, `line` bytes apart, which may be read
// 16 bytes past their ends.
void cut_patches(const uint8_t* lines, int64_t line, int64_t channel, PatchWalk walk);

}  // namespace rtp_mm
