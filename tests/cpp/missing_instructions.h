// Instructions for a CPU that has AVX-512 and lacks them, or may not use them: carried out by the handler of the signal
// that they raise there. So the very code that other CPUs run is run, slowly.

#pragma once

#ifdef __x86_64__

#include <signal.h>
#include <ucontext.h>

#include <cstdlib>

#include "amx_instructions.h"
#include "bf16_instruction.h"

namespace rtp_mm {

inline void run_missing_instruction(int, siginfo_t*, void* argument) {
  auto* context = static_cast<ucontext_t*>(argument);
  if (!run_bf16_instruction(context) && !run_amx_instruction(context)) std::abort();
}

inline void emulate_missing_instructions() {
  struct sigaction action = {};
  action.sa_sigaction = run_missing_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace rtp_mm

#endif
