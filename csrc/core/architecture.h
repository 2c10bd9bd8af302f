// What a launcher needs to know about a GPU, by its architecture alone: never the number of processors, which would
// make results depend on the card.
#pragma once

#include <atomic>

namespace dinov3_ext {

// 10 major + minor, e.g. 90, of CUDA device `device`: asked once per device, without synchronisation; 0 where it cannot
// be asked. The emulator pretends to be what a test sets.
#if defined(DINOV3_EXT_EMULATOR)
inline std::atomic<int>& emulated_architecture() {
  static std::atomic<int> architecture{90};
  return architecture;
}
inline int device_architecture(int) { return emulated_architecture().load(); }
#else
int device_architecture(int device);
#endif

// Dynamic shared memory that one block may use, in bytes.
inline int shared_bytes_per_block(int architecture) {
  switch (architecture) {
    case 80:
    case 87: return 163 * 1024;
    case 90:
    case 100:
    case 103:
    case 110: return 227 * 1024;
    default: return 99 * 1024;  // 86, 89, 120 and what is not known yet
  }
}

// Shared memory of one processor, of which each block takes 1 KB more than it asks for.
inline int shared_bytes_per_processor(int architecture) { return shared_bytes_per_block(architecture) + 1024; }

}  // namespace dinov3_ext
