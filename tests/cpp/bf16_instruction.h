// `vdpbf16ps`, carried out by software: see missing_instructions.h.
//
// Sources: Intel's Software Developer's Manual, volumes 1 (13: XSAVE's memory) and 2 (the instruction; 2.7: EVEX).

#pragma once

#ifdef __x86_64__

#include <cpuid.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace rtp_mm {

// The vector registers of an interrupted thread, within the memory that its signal frame restores them from.
class SavedRegisters {
 public:
  explicit SavedRegisters(ucontext_t* context)
      : memory_(reinterpret_cast<uint8_t*>(context->uc_mcontext.fpregs)),
        present_(reinterpret_cast<uint64_t*>(memory_ + kHeader)) {}

  // Lanes [4 * quarter, 4 * quarter + 4) of register `index`, as bits.
  uint32_t* lanes(int index, int quarter) {
    if (index >= 16) return at(kUpperRegisters, 64 * (index - 16) + 16 * quarter);
    if (quarter >= 2) return at(kUpperHalves, 32 * index + 16 * (quarter - 2));
    if (quarter == 1) return at(kSecondQuarters, 16 * index);
    return at(kFirstQuarters, 16 * index);
  }

 private:
  enum Component { kFirstQuarters = 1, kSecondQuarters = 2, kUpperHalves = 6, kUpperRegisters = 7 };
  static constexpr int kHeader = 512, kFirstQuartersOffset = 160;

  struct Place {
    unsigned size, offset;
  };

  static Place place_of(Component component) {
    if (component == kFirstQuarters) return {256, kFirstQuartersOffset};
    Place place{};
    unsigned unused;
    __cpuid_count(0xd, component, place.size, place.offset, unused, unused);
    return place;
  }

  uint32_t* at(Component component, int offset) {
    static const Place places[] = {
        {}, place_of(kFirstQuarters), place_of(kSecondQuarters), {}, {},
        {}, place_of(kUpperHalves),   place_of(kUpperRegisters)};  // asked once: a virtual machine answers slowly
    const Place& place = places[component];
    if (!(*present_ >> component & 1)) {  // all zeros, and not written out
      std::memset(memory_ + place.offset, 0, place.size);
      *present_ |= uint64_t{1} << component;
    }
    return reinterpret_cast<uint32_t*>(memory_ + place.offset + offset);
  }

  uint8_t* memory_;
  uint64_t* present_;
};

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// sum + a * b of two bfloat16s in the upper halves of words.
inline float bf16_step(float sum, uint32_t a, uint32_t b) {
  const float x = flushed(std::bit_cast<float>(a & 0xffff0000)), y = flushed(std::bit_cast<float>(b & 0xffff0000));
  return flushed(std::fma(x, y, flushed(sum)));
}

// Whether it is what the thread stands at; then it is done. Between registers of 512 bits, without a mask, which is all
// that we use.
inline bool run_bf16_instruction(ucontext_t* context) {
  const auto* code = reinterpret_cast<const uint8_t*>(context->uc_mcontext.gregs[REG_RIP]);
  const bool is_known = code[0] == 0x62 && (code[1] & 0x0f) == 0x02 && (code[2] & 0x87) == 0x06 &&
                        (code[3] & 0xf7) == 0x40 && code[4] == 0x52 && code[5] >> 6 == 3;
  if (!is_known) return false;
  const auto missing = [&](int byte, int bit) { return ~code[byte] >> bit & 1; };  // the prefix has them inverted
  const int dst = (code[5] >> 3 & 7) | missing(1, 7) << 3 | missing(1, 4) << 4;
  const int first = (~code[2] >> 3 & 15) | missing(3, 3) << 4;
  const int second = (code[5] & 7) | missing(1, 5) << 3 | missing(1, 6) << 4;
  SavedRegisters registers(context);
  for (int quarter = 0; quarter < 4; ++quarter) {
    const uint32_t *a = registers.lanes(first, quarter), *b = registers.lanes(second, quarter);
    uint32_t* sums = registers.lanes(dst, quarter);
    for (int i = 0; i < 4; ++i) {
      const float upper = bf16_step(std::bit_cast<float>(sums[i]), a[i], b[i]);
      sums[i] = std::bit_cast<uint32_t>(bf16_step(upper, a[i] << 16, b[i] << 16));
    }
  }
  context->uc_mcontext.gregs[REG_RIP] += 6;
  return true;
}

}  // namespace rtp_mm

#endif
