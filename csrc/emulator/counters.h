// What a launch did, counted. One X-macro, so that a counter is named once.
#pragma once

#include <cstdint>

namespace dinov3_ext::emulator {

// mma, ldmatrix, shuffles, warp barriers: warp instructions. exp2, log2: of single threads. *_bytes: requested.
// *_sectors: distinct 32-byte sectors of a launch, added up over launches. *_transactions: distinct sectors of each
// warp instruction, added up over instructions: more than a quarter of the requested 128-byte lines says "not
// coalesced". wavefronts: passes over the 32 banks that the warp instructions on shared memory need. *_conflicts: those
// beyond the fewest possible for the access's width, of all instructions and of two kinds alone.
#define DINOV3_EXT_EMULATOR_COUNTERS(X)                                                                     \
  X(launches)                                                                                               \
  X(blocks)                                                                                                 \
  X(mma)                                                                                                    \
  X(ldmatrix)                                                                                               \
  X(copy_async_bytes)                                                                                       \
  X(global_read_bytes)                                                                                      \
  X(global_written_bytes)                                                                                   \
  X(global_read_sectors)                                                                                    \
  X(global_written_sectors)                                                                                 \
  X(global_read_transactions)                                                                               \
  X(global_write_transactions) X(shared_read_bytes) X(shared_written_bytes) X(wavefronts) X(bank_conflicts) \
      X(ldmatrix_conflicts) X(copy_async_conflicts) X(exp2) X(log2) X(shuffles) X(warp_barriers) X(block_barriers)

struct Counters {
#define DINOV3_EXT_EMULATOR_FIELD(name) int64_t name = 0;
  DINOV3_EXT_EMULATOR_COUNTERS(DINOV3_EXT_EMULATOR_FIELD)
#undef DINOV3_EXT_EMULATOR_FIELD

  void operator+=(const Counters& other) {
#define DINOV3_EXT_EMULATOR_ADD(name) name += other.name;
    DINOV3_EXT_EMULATOR_COUNTERS(DINOV3_EXT_EMULATOR_ADD)
#undef DINOV3_EXT_EMULATOR_ADD
  }
};

}  // namespace dinov3_ext::emulator
