// What the emulator remembers of every byte of a block's shared memory: who wrote it last, who has read it since.
//
// Memory is ordered between threads by block barriers (the block's epoch moves on) and by warp barriers (the warp's
// epoch moves on) alone. Two accesses of different threads to the same bytes, one of them a write, are a race if both
// fall into the same block epoch, unless both threads are of one warp and a warp barrier lies between them. The record
// is exact: the last writer is enough, since an earlier one is ordered before it (or was reported), and of the readers
// all warps of this block epoch and all lanes of the last warp since its last barrier are kept.
//
// Epochs never go back, so nothing is cleared between blocks. Records exist for 16-byte chunks (accesses of whole
// chunks: nearly all) and for the eight 2-byte cells within (accesses of parts); every access looks at both.
#pragma once

#include <cstdint>
#include <vector>

namespace dinov3_ext::emulator {

struct Moment {  // who accesses, and when
  uint32_t epoch, warp_epoch;
  int thread;
  int warp() const { return thread >> 5; }
  uint32_t lane_bit() const { return 1u << (thread & 31); }
};

struct Record {
  uint32_t written = 0, written_warp_epoch = 0;  // epochs of the last write
  uint32_t read = 0, read_warp_epoch = 0;        // epochs of the last read
  uint32_t warps = 0;                            // that read in block epoch `read`
  uint32_t lanes = 0;                            // of warp `reader` that read in its epoch `read_warp_epoch`
  uint16_t writer = 0;                           // thread
  uint16_t reader = 0;                           // warp

  // Thread whose write is not ordered before `now`, or -1.
  int writer_before(const Moment& now) const {
    const bool race = written == now.epoch && writer != now.thread &&
                      !(writer >> 5 == now.warp() && written_warp_epoch < now.warp_epoch);
    return race ? writer : -1;
  }
  // Thread whose read is not ordered before `now`, or -1.
  int reader_before(const Moment& now) const {
    if (read != now.epoch) return -1;
    if (const uint32_t others = warps & ~(1u << now.warp())) return 32 * __builtin_ctz(others);
    if (read_warp_epoch != now.warp_epoch) return -1;
    const uint32_t others = lanes & ~now.lane_bit();
    return others ? 32 * reader + __builtin_ctz(others) : -1;
  }
  void note_write(const Moment& now) {
    written = now.epoch, written_warp_epoch = now.warp_epoch, writer = uint16_t(now.thread);
  }
  void note_read(const Moment& now) {
    if (read != now.epoch) {
      read = now.epoch, warps = 0, lanes = 0;
    } else if (reader != now.warp() || read_warp_epoch != now.warp_epoch) {
      lanes = 0;
    }
    reader = uint16_t(now.warp()), read_warp_epoch = now.warp_epoch;
    warps |= 1u << now.warp(), lanes |= now.lane_bit();
  }
};

struct Chunk {
  Record whole;
  uint32_t partial = 0;    // block epoch of the last access to a part of it
  uint32_t in_flight = 0;  // serial number of the block whose asynchronous copy is under way, else 0
  uint16_t owner = 0;      // thread that started it
};

// What is wrong with an access; `other`: the thread it meets.
struct Conflict {
  enum Kind { none, read_after_write, write_after_write, write_after_read } kind = none;
  int other = -1;
};

class Shadow {
 public:
  void resize(uint32_t bytes) {
    if (chunks_.size() < bytes / 16 + 1) chunks_.resize(bytes / 16 + 1), cells_.resize(8 * (bytes / 16 + 1));
  }
  Chunk& chunk(uint32_t offset) { return chunks_[offset >> 4]; }

  // Whether the whole chunk may be read and that has been noted: the frequent case, else read() has the answer.
  bool read_again(uint32_t offset, const Moment& now, uint32_t serial) {
    Chunk& chunk = chunks_[offset >> 4];
    Record& record = chunk.whole;
    if (chunk.in_flight == serial || chunk.partial == now.epoch || record.written == now.epoch) return false;
    if (record.read != now.epoch || record.reader != now.warp() || record.read_warp_epoch != now.warp_epoch) {
      record.note_read(now);
    } else {
      record.lanes |= now.lane_bit();
    }
    return true;
  }

  Conflict read(uint32_t offset, uint32_t bytes, const Moment& now) {
    Chunk& chunk = chunks_[offset >> 4];
    int other = chunk.whole.writer_before(now);
    if (other >= 0) return {Conflict::read_after_write, other};
    if (bytes == 16) {
      if (chunk.partial == now.epoch) {
        for (uint32_t i = 0; i < 8; ++i) {
          other = cells_[(offset >> 1) + i].writer_before(now);
          if (other >= 0) return {Conflict::read_after_write, other};
        }
      }
      chunk.whole.note_read(now);
    } else {
      for (uint32_t i = 0; i < bytes / 2; ++i) {
        Record& cell = cells_[(offset >> 1) + i];
        other = cell.writer_before(now);
        if (other >= 0) return {Conflict::read_after_write, other};
        cell.note_read(now);
      }
      chunk.partial = now.epoch;
    }
    return {};
  }

  Conflict write(uint32_t offset, uint32_t bytes, const Moment& now) {
    Chunk& chunk = chunks_[offset >> 4];
    Conflict conflict = meets(chunk.whole, now);
    if (conflict.kind) return conflict;
    const bool whole = bytes == 16;
    if (!whole || chunk.partial == now.epoch) {
      for (uint32_t i = 0; i < bytes / 2; ++i) {
        conflict = meets(cells_[(offset >> 1) + i], now);
        if (conflict.kind) return conflict;
      }
    }
    if (whole) {
      chunk.whole.note_write(now);
    } else {
      for (uint32_t i = 0; i < bytes / 2; ++i) cells_[(offset >> 1) + i].note_write(now);
      chunk.partial = now.epoch;
    }
    return {};
  }

 private:
  static Conflict meets(const Record& record, const Moment& now) {
    int other = record.writer_before(now);
    if (other >= 0) return {Conflict::write_after_write, other};
    other = record.reader_before(now);
    return other >= 0 ? Conflict{Conflict::write_after_read, other} : Conflict{};
  }

  std::vector<Chunk> chunks_;
  std::vector<Record> cells_;
};

}  // namespace dinov3_ext::emulator
