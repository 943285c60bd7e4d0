#include "cpu/multiply_amx.h"

namespace rtp_mm {
namespace {

// What LDTILECFG reads: all eight tiles are whole ones.
struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

[[maybe_unused]] constexpr Configuration kConfiguration;

}  // namespace

AmxTiles::AmxTiles(bool is_used) : is_used_(is_used) {
#ifdef __x86_64__
  if (is_used_) asm volatile("ldtilecfg %0" : : "m"(kConfiguration));
#endif
}

AmxTiles::~AmxTiles() {
#ifdef __x86_64__
  if (is_used_) asm volatile("tilerelease");
#endif
}

}  // namespace rtp_mm
