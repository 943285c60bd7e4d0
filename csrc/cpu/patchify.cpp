#include "cpu/patchify.h"

namespace rtp_mm {
namespace {

// One patch: `pixels` at its first frame's top left corner.
void copy_patch(const Patchify& job, const uint8_t* pixels, uint8_t* row) {
  const int64_t area = job.patch * job.patch, plane = job.temporal * area;
  for (int64_t frame = 0; frame < job.temporal; ++frame) {
    for (int64_t y = 0; y < job.patch; ++y) {
      const uint8_t* src = pixels + (frame * job.height + y) * job.width * 3;
      uint8_t* dst = row + frame * area + y * job.patch;
      for (int64_t x = 0; x < job.patch; ++x) {
        dst[x] = src[3 * x];
        dst[plane + x] = src[3 * x + 1];
        dst[2 * plane + x] = src[3 * x + 2];
      }
    }
  }
}

}  // namespace

void patchify(const Patchify& job, uint8_t* rows) {
  const int64_t block = job.patch * job.merge, row_bytes = 3 * job.temporal * job.patch * job.patch;
  for (int64_t frame = 0; frame < job.frames; frame += job.temporal) {
    for (int64_t top = 0; top < job.height; top += block) {
      for (int64_t left = 0; left < job.width; left += block) {
        for (int64_t y = top; y < top + block; y += job.patch) {
          for (int64_t x = left; x < left + block; x += job.patch, rows += row_bytes) {
            copy_patch(job, job.pixels + ((frame * job.height + y) * job.width + x) * 3, rows);
          }
        }
      }
    }
  }
}

}  // namespace rtp_mm
