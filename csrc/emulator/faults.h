// Invalid addresses that a kernel follows become findings instead of the end of the process.
#pragma once

namespace dinov3_ext::emulator {

// While one lives, SIGSEGV and SIGBUS of its thread are asked whether a kernel caused them. What was installed before
// gets the others, and is back afterwards.
struct CatchFaults {
  CatchFaults();
  ~CatchFaults();
  CatchFaults(const CatchFaults&) = delete;
};

}  // namespace dinov3_ext::emulator
