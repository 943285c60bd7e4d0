#include "cpu/patch_rows.h"

#include <cstring>

#include "merge_order.h"

namespace rtp_mm {
namespace {

// The bytes of one patch in one channel. kPatch is dst.patch, or 0 for one that is only known at run time.
template <int64_t kPatch>
void copy_patch(const uint8_t* const* lines, int64_t offset, int64_t patch, uint8_t* dst) {
  if constexpr (kPatch == 0) {
    for (int64_t y = 0; y < patch; ++y) std::memcpy(dst + y * patch, lines[y] + offset, patch);
  } else {
    // Whole vectors: what they write too far, the next line puts right.
    static_assert(kPatch <= 16 && 16 <= 2 * kPatch);
    for (int64_t y = 0; y < kPatch - 1; ++y) std::memcpy(dst + y * kPatch, lines[y] + offset, 16);
    std::memcpy(dst + (kPatch - 1) * kPatch, lines[kPatch - 1] + offset, kPatch);
  }
}

template <int64_t kPatch>
void cut(const uint8_t* const* lines, int64_t plane, int64_t patch_row, const PatchRows& dst) {
  const int64_t area = dst.patch * dst.patch, columns = dst.width / dst.patch;
  for (int64_t column = 0; column < columns; ++column) {
    const int64_t row = merge_order(patch_row, column, columns, dst.merge);
    for (int64_t channel = 0; channel < 3; ++channel) {
      copy_patch<kPatch>(lines, channel * plane + column * dst.patch, dst.patch,
                         dst.rows + ((row * 3 + channel) * dst.temporal + dst.slot) * area);
    }
  }
}

}  // namespace

void cut_patches(const uint8_t* const* lines, int64_t plane, int64_t patch_row, const PatchRows& dst) {
  if (dst.patch == 14) return cut<14>(lines, plane, patch_row, dst);
  if (dst.patch == 16) return cut<16>(lines, plane, patch_row, dst);
  cut<0>(lines, plane, patch_row, dst);
}

}  // namespace rtp_mm
