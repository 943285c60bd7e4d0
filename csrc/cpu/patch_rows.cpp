#include "cpu/patch_rows.h"

#include <cstring>

namespace rtp_mm {
namespace {

// The bytes of one patch in one channel. kPatch is dst.patch, or 0 for one that is only known at run time.
template <int64_t kPatch>
void copy_patch(const uint8_t* src, int64_t line, int64_t patch, uint8_t* dst) {
  if constexpr (kPatch == 0) {
    for (int64_t y = 0; y < patch; ++y) std::memcpy(dst + y * patch, src + y * line, patch);
  } else {
    // Whole vectors: what they write too far, the next line puts right.
    static_assert(kPatch <= 16 && 16 <= 2 * kPatch);
    for (int64_t y = 0; y < kPatch - 1; ++y) std::memcpy(dst + y * kPatch, src + y * line, 16);
    std::memcpy(dst + (kPatch - 1) * kPatch, src + (kPatch - 1) * line, kPatch);
  }
}

template <int64_t kPatch>
void cut(const uint8_t* lines, int64_t line, int64_t channel, PatchWalk walk) {
  for (; !walk.is_done(); walk.next(), lines += walk.dst().patch) {
    copy_patch<kPatch>(lines, line, walk.dst().patch, walk.patch(channel));
  }
}

}  // namespace

void cut_patches(const uint8_t* lines, int64_t line, int64_t channel, PatchWalk walk) {
  if (walk.dst().patch == 14) return cut<14>(lines, line, channel, walk);
  if (walk.dst().patch == 16) return cut<16>(lines, line, channel, walk);
  cut<0>(lines, line, channel, walk);
}

}  // namespace rtp_mm
