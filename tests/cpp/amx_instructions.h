// AMX's instructions, carried out by software: see missing_instructions.h.
//
// Source: Intel's Software Developer's Manual, volume 2 (the instructions; 2.3: VEX; 2.1: how memory is addressed).

#pragma once

#ifdef __x86_64__

#include <ucontext.h>

#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>

#include "bf16_instruction.h"

namespace rtp_mm {

// Of a thread.
inline thread_local uint32_t emulated_tiles[8][16][16];
inline std::atomic<int> emulated_amx_instructions = 0;

// sums[m][n] += what `step` makes of row m of `left` and column n of `right`.
template <class Step>
void each_sum(uint32_t (&sums)[16][16], const uint32_t (&left)[16][16], const uint32_t (&right)[16][16], Step step) {
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      uint32_t column[16];
      for (int k = 0; k < 16; ++k) column[k] = right[k][n];
      sums[m][n] = step(sums[m][n], left[m], column);
    }
  }
}

inline uint32_t tile_step_of_bf16(uint32_t sum, const uint32_t* left, const uint32_t* right) {
  float lower = 0, upper = 0;
  for (int k = 0; k < 16; ++k) {
    lower = bf16_step(lower, left[k] << 16, right[k] << 16);
    upper = bf16_step(upper, left[k], right[k]);
  }
  return std::bit_cast<uint32_t>(flushed(flushed(std::bit_cast<float>(sum)) + flushed(lower + upper)));
}

inline uint32_t tile_step_of_bytes(uint32_t sum, const uint32_t* left, const uint32_t* right) {
  for (int k = 0; k < 16; ++k) {
    for (int shift = 0; shift < 32; shift += 8) {
      sum += (left[k] >> shift & 0xff) * static_cast<int8_t>(right[k] >> shift);
    }
  }
  return sum;
}

// Whether one of those that we use is what the thread stands at; then it is done.
inline bool run_amx_instruction(ucontext_t* context) {
  constexpr int kRegisters[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  auto& registers = context->uc_mcontext.gregs;
  const auto* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return false;  // VEX.128, map 0F38, W0
  ++emulated_amx_instructions;
  enum Prefix { kNone, k66, kF3, kF2 };
  const auto prefix = static_cast<Prefix>(code[2] & 3);
  const int opcode = code[3], mod = code[4] >> 6, reg = code[4] >> 3 & 7, rm = code[4] & 7;
  const int third = ~code[2] >> 3 & 15;
  const auto with_high_bit = [&](int low, int bit) { return low | (~code[1] >> bit & 1) << 3; };
  if (mod == 3) {
    registers[REG_RIP] += 5;
    auto& tile = emulated_tiles[reg];
    if (opcode == 0x49 && prefix == kNone) return true;  // TILERELEASE
    if (opcode == 0x49 && prefix == kF2) {
      std::memset(tile, 0, sizeof tile);
    } else if (opcode == 0x5c && prefix == kF3) {
      each_sum(tile, emulated_tiles[rm], emulated_tiles[third], tile_step_of_bf16);
    } else if (opcode == 0x5e && prefix == k66) {
      each_sum(tile, emulated_tiles[rm], emulated_tiles[third], tile_step_of_bytes);
    } else {
      return false;
    }
    return true;
  }
  const bool is_indexed = rm == 4;
  const int displacement_bytes = mod == 0 ? (rm == 5 ? 4 : 0) : mod == 1 ? 1 : 4;
  registers[REG_RIP] += 5 + is_indexed + displacement_bytes;
  if (opcode == 0x49 && prefix == kNone) return true;  // LDTILECFG: all of ours are whole tiles
  if (opcode != 0x4b || !is_indexed || (mod == 0 && (code[5] & 7) == 5)) return false;
  int64_t displacement = 0;
  if (displacement_bytes == 1) displacement = static_cast<int8_t>(code[6]);
  if (displacement_bytes == 4) {
    int32_t wide;
    std::memcpy(&wide, code + 6, sizeof wide);
    displacement = wide;
  }
  const int64_t stride = registers[kRegisters[with_high_bit(code[5] >> 3 & 7, 6)]] << (code[5] >> 6);
  auto* row = reinterpret_cast<uint8_t*>(registers[kRegisters[with_high_bit(code[5] & 7, 5)]] + displacement);
  for (int i = 0; i < 16; ++i, row += stride) {
    if (prefix == kF2) {
      std::memcpy(emulated_tiles[reg][i], row, 64);
    } else {
      std::memcpy(row, emulated_tiles[reg][i], 64);
    }
  }
  return prefix == kF2 || prefix == kF3;
}

}  // namespace rtp_mm

#endif
