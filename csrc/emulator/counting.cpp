// Warp instructions on memory, put together again from what the lanes did one after another: bank conflicts of shared
// memory and sectors per request of global memory.
#include <algorithm>

#include "emulator/runtime.h"

namespace dinov3_ext::emulator {
namespace {

// Passes over 32 banks of 4 bytes that the accesses need at once: the most distinct words in one bank.
int passes(const Access* const* lanes, int count) {
  uint32_t banks = 0;
  bool collision = false;
  for (int i = 0; i < count; ++i) {
    for (uint32_t word = uint32_t(lanes[i]->address >> 2), last = word + std::max(1, lanes[i]->bytes / 4); word < last;
         ++word) {
      collision |= banks >> (word & 31) & 1;
      banks |= 1u << (word & 31);
    }
  }
  if (!collision) return 1;
  uint32_t words[32 * 4];
  int of_bank[32] = {}, most = 1, known = 0;
  for (int i = 0; i < count; ++i) {
    for (uint32_t word = uint32_t(lanes[i]->address >> 2), last = word + std::max(1, lanes[i]->bytes / 4); word < last;
         ++word) {
      if (std::find(words, words + known, word) != words + known) continue;
      words[known++] = word;
      most = std::max(most, ++of_bank[word & 31]);
    }
  }
  return most;
}

}  // namespace

// lanes: the accesses of one instruction, lowest lane first. Phases are cut by position, which is exact where all lanes
// take part.
void Worker::count_instruction(const Access* const* lanes, int count) {
  const Access& first = *lanes[0];
  int64_t bytes = 0;
  for (int i = 0; i < count; ++i) bytes += lanes[i]->bytes;
  if (first.kind == Access::global_read || first.kind == Access::global_write) {
    const bool read = first.kind == Access::global_read;
    (read ? counters.global_read_bytes : counters.global_written_bytes) += bytes;
    uint64_t sectors[32];
    int known = 0;
    for (int i = 0; i < count; ++i) {
      const uint64_t sector = lanes[i]->address >> 5;
      if (known && sectors[known - 1] == sector) continue;
      if (std::find(sectors, sectors + known, sector) == sectors + known) sectors[known++] = sector;
    }
    (read ? counters.global_read_transactions : counters.global_write_transactions) += known;
    return;
  }
  if (first.kind == Access::shared_read) counters.shared_read_bytes += bytes;
  if (first.kind == Access::shared_write) counters.shared_written_bytes += bytes;
  if (first.kind == Access::copy_to) counters.copy_async_bytes += bytes;
  const int per_phase = std::min(32, 128 / std::max<int>(4, first.bytes));
  for (int i = 0; i < count; i += per_phase) {
    const int needed = passes(lanes + i, std::min(per_phase, count - i));
    counters.wavefronts += needed;
    counters.bank_conflicts += needed - 1;
    if (first.kind == Access::copy_to) counters.copy_async_conflicts += needed - 1;
  }
}

// The lanes' accesses since the last collective, as instructions: the next access of every lane that stands at the same
// place of the source. Exact without divergence; where lanes took different ways, the lowest lane leads.
void Worker::count_accesses(int warp) {
  Fiber* const lanes = &fibers[32 * warp];
  size_t next[32] = {};
  const Access* together[32];
  for (int leader = 0; leader < 32;) {
    if (next[leader] == lanes[leader].accesses.size()) {
      ++leader;
      continue;
    }
    const Access& first = lanes[leader].accesses[next[leader]];
    int count = 0;
    for (int i = leader; i < 32; ++i) {
      if (next[i] == lanes[i].accesses.size()) continue;
      const Access& access = lanes[i].accesses[next[i]];
      if (access.site != first.site || access.kind != first.kind || access.bytes != first.bytes) continue;
      together[count++] = &access;
      ++next[i];
    }
    count_instruction(together, count);
  }
  for (int i = 0; i < 32; ++i) lanes[i].accesses.clear();
}

// Too many to keep: as instructions of one lane each. Bytes stay exact, transactions become an upper bound.
void Worker::count_one_by_one(std::vector<Access>& accesses) {
  for (const Access& access : accesses) {
    const Access* const alone = &access;
    count_instruction(&alone, 1);
  }
  accesses.clear();
}

// Four phases of eight rows; a row takes four neighbouring banks.
void Worker::matrix_wavefronts(const uint32_t (&address)[32]) {
  for (int phase = 0; phase < 4; ++phase) {
    const uint32_t* rows = address + 8 * phase;
    uint32_t groups = 0;
    for (int i = 0; i < 8; ++i) groups |= 1u << (rows[i] >> 4 & 7);
    int needed = 1;
    if (groups != 0xff) {
      int of_group[8] = {};
      for (int i = 0; i < 8; ++i) {
        if (std::find(rows, rows + i, rows[i]) != rows + i) continue;  // the same row twice is one access
        needed = std::max(needed, ++of_group[rows[i] >> 4 & 7]);
      }
    }
    counters.wavefronts += needed;
    counters.bank_conflicts += needed - 1;
    counters.ldmatrix_conflicts += needed - 1;
  }
}

}  // namespace dinov3_ext::emulator
