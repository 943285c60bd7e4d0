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

// From patch to patch of one row of them, left to right. `patch_row` counts from the image's top.
class PatchWalk {
 public:
  PatchWalk(const PatchRows& dst, int64_t patch_row)
      : dst_(dst),
        columns_(dst.width / dst.patch),
        row_(dst.rows + merge_order<int64_t>(patch_row, 0, columns_, dst.merge) * dst.row_bytes()) {}

  bool is_done() const { return column_ == columns_; }
  int64_t column() const { return column_; }

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
  int64_t columns_;
  uint8_t* row_;
  int64_t column_ = 0, column_in_block_ = 0;
};

// Cuts one row of patches out of `patch` lines, `line` bytes apart: three planes each, `plane` bytes apart, which may
// be read 16 bytes past their ends.
void cut_patches(const uint8_t* lines, int64_t line, int64_t plane, int64_t patch_row, const PatchRows& dst);

}  // namespace rtp_mm
