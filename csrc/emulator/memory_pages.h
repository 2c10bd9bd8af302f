// Global memory as the emulator sees it: the ranges of the running op and, per page, which sectors a launch has touched
// and who wrote and read what. Inside csrc/emulator only.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "emulator/runtime.h"

namespace dinov3_ext::emulator {

const std::vector<Range>& announced();
bool has_finding();  // of the running op: like an error of CUDA, it stays until the op has ended
void set_finding();

// Two bytes of memory that kernels may write. Serial numbers of blocks and epochs in them; older launches have lower
// serial numbers, so nothing is cleared.
struct GlobalCell {
  uint32_t writer_block = 0, writer_epoch = 0;
  uint32_t reader_block = 0, reader_epoch = 0;
  uint32_t other_reader_block = 0;  // another one that read it
  uint32_t constant_block = 0;      // that read it through load_global
  uint16_t writer_thread = 0;
  uint16_t reader_thread = 0;  // kMany: several of reader_block in reader_epoch
};
inline constexpr uint16_t kMany = 0xffff;

struct Page {
  static constexpr uintptr_t kBytes = 4096;
  std::atomic_flag lock;
  uint32_t read[kBytes / 32] = {}, written[kBytes / 32] = {};  // number of the last launch that did
  std::unique_ptr<GlobalCell[]> cells;                         // made when first needed
};

void forget_all_pages();
void limit_pages();  // forgets them when they take too much memory

}  // namespace dinov3_ext::emulator
