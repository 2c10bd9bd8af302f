// Stands before csrc/emulator/memory.h when the recorder is built: tensors are only passed on, nothing runs. Which
// addresses are tensors is kept, so that pointers among a kernel's arguments are known from numbers.
#pragma once

#include <cstdint>

namespace dinov3_ext::emulator {

void announce(const void* data, int64_t bytes, bool writable);
inline void poison(void*, int64_t) {}

}  // namespace dinov3_ext::emulator
