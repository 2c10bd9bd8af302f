#include "emulator/memory.h"

#include <cstring>
#include <mutex>
#include <unordered_map>

#include "emulator/memory_pages.h"

namespace dinov3_ext::emulator {
namespace {

thread_local std::vector<Range> ranges;
thread_local bool finding_of_op = false;

std::mutex pages_lock;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
std::atomic<int64_t> pages_with_cells{0};

struct PageLock {
  Page& page;
  const bool needed;
  PageLock(Page& page, bool needed) : page(page), needed(needed) {
    if (needed) {
      while (page.lock.test_and_set(std::memory_order_acquire)) {
      }
    }
  }
  ~PageLock() {
    if (needed) page.lock.clear(std::memory_order_release);
  }
};

GlobalCell* cells_at(Page& page, uintptr_t address) {
  if (!page.cells) {
    page.cells = std::make_unique<GlobalCell[]>(Page::kBytes / 2);
    ++pages_with_cells;
  }
  return page.cells.get() + address % Page::kBytes / 2;
}

}  // namespace

void announce(const void* data, int64_t bytes, bool writable) {
  if (bytes <= 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  Range range{begin, begin + uintptr_t(bytes), writable, writable};
  for (Range& other : ranges) {
    if (other.begin == range.begin && other.end == range.end && other.writable == writable) return;
    if (other.begin < range.end && range.begin < other.end) {
      range.shares_writable |= other.writable;
      other.shares_writable |= writable;
    }
  }
  ranges.push_back(range);
}

void poison(void* data, int64_t bytes) {
  if (bytes > 0) std::memset(data, 0xff, size_t(bytes));
}

Operation::Operation() { ranges.clear(), finding_of_op = false; }
Operation::~Operation() { ranges.clear(), finding_of_op = false; }

const std::vector<Range>& announced() { return ranges; }
bool has_finding() { return finding_of_op; }
void set_finding() { finding_of_op = true; }

void forget_all_pages() {
  const std::lock_guard lock(pages_lock);
  pages.clear();
  pages_with_cells = 0;
}

void limit_pages() {
  if (pages_with_cells > 8192 || pages.size() > 262144) forget_all_pages();  // some 0.5 GB
}

Page& Worker::page_of(uintptr_t address) {
  const uintptr_t number = address / Page::kBytes;
  CachedPage& cached = pages_[number % pages_.size()];
  if (cached.number != number) {
    const std::lock_guard lock(pages_lock);
    std::unique_ptr<Page>& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    cached = {number, page.get()};
  }
  return *cached.page;
}

// The announced range that holds the bytes; a finding where there is none.
const Range& Worker::range_of(uintptr_t address, uint32_t bytes, bool write, const char* word, const Location& at) {
  const void* pointer = reinterpret_cast<const void*>(address);
  if (address % bytes) finding("misaligned", thread, at, "%s of %u bytes of global memory at %p", word, bytes, pointer);
  const std::vector<Range>& all = *launch->ranges;
  const Range* nearest = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (const Range& range : all) {
    if (address >= range.begin && address + bytes <= range.end && (range.writable || !write)) return range;
    const uintptr_t away = address < range.begin         ? range.begin - address
                           : address + bytes > range.end ? address + bytes - range.end
                                                         : 0;
    if (away < distance) nearest = &range, distance = away;
  }
  if (!nearest)
    finding("out of bounds", thread, at, "%s of %u bytes at %p: no tensor was announced", word, bytes, pointer);
  const char* access = nearest->writable ? "writable" : "read-only";
  const long size = long(nearest->end - nearest->begin);
  if (distance == 0) {
    finding("read-only memory", thread, at, "%s of %u bytes at byte %ld of a tensor of %ld bytes that is input only",
            word, bytes, long(address - nearest->begin), size);
  }
  finding("out of bounds", thread, at, "%s of %u bytes at %p, byte %ld of the nearest tensor (%p, %ld bytes, %s)", word,
          bytes, pointer, long(address) - long(nearest->begin), reinterpret_cast<const void*>(nearest->begin), size,
          access);
}

void Worker::check_global_read(const void* from, uint32_t bytes, bool constant, const char* word, const Location& at) {
  const auto address = reinterpret_cast<uintptr_t>(host_pointer(from));
  const Range& range = range_of(address, bytes, /*write=*/false, word, at);
  note(Access::global_read, address, bytes, at);
  Page& page = page_of(address);
  const char* problem = nullptr;
  int other = 0;
  uint32_t other_block = 0;
  {
    const PageLock lock(page, launch->several_workers);
    uint32_t& sector = page.read[address % Page::kBytes / 32];
    counters.global_read_sectors += sector != launch->number;
    sector = launch->number;
    if (!launch->races || !range.shares_writable) return;
    GlobalCell* cell = cells_at(page, address);
    for (uint32_t i = 0; i < bytes / 2 && !problem; ++i, ++cell) {
      if (cell->writer_block >= launch->first_serial) {
        other = cell->writer_thread, other_block = cell->writer_block;
        if (constant) {
          problem = "this launch writes it; load_global promises that nobody does";
        } else if (other_block != serial) {
          problem = "another block writes it";
        } else if (other != thread && cell->writer_epoch == barriers_passed) {
          problem = "another thread writes it, with no block barrier between them";
        }
      }
      if (constant) cell->constant_block = serial;
      if (cell->reader_block != serial) {
        cell->other_reader_block = cell->reader_block;
        cell->reader_block = serial, cell->reader_epoch = barriers_passed, cell->reader_thread = uint16_t(thread);
      } else if (cell->reader_epoch != barriers_passed) {
        cell->reader_epoch = barriers_passed, cell->reader_thread = uint16_t(thread);
      } else if (cell->reader_thread != thread) {
        cell->reader_thread = kMany;
      }
    }
  }
  if (problem) {
    finding("global race", thread, at, "%s of %u bytes at byte %ld of a tensor: %s (block number %ld, thread %d)", word,
            bytes, long(address - range.begin), problem, long(other_block - launch->first_serial), other);
  }
}

void Worker::check_global_write(void* to, uint32_t bytes, const Location& at) {
  const auto address = reinterpret_cast<uintptr_t>(host_pointer(to));
  const Range& range = range_of(address, bytes, /*write=*/true, "store_global", at);
  note(Access::global_write, address, bytes, at);
  Page& page = page_of(address);
  const char* problem = nullptr;
  uint32_t other_block = 0;
  {
    const PageLock lock(page, launch->several_workers);
    uint32_t& sector = page.written[address % Page::kBytes / 32];
    counters.global_written_sectors += sector != launch->number;
    sector = launch->number;
    if (!launch->races) return;
    const uint32_t first = launch->first_serial;
    GlobalCell* cell = cells_at(page, address);
    auto elsewhere = [&](uint32_t block) {
      if (block < first || block == serial) return false;
      other_block = block;
      return true;
    };
    for (uint32_t i = 0; i < bytes / 2 && !problem; ++i, ++cell) {
      if (elsewhere(cell->writer_block)) {
        problem = "another block writes it too";
      } else if (elsewhere(cell->reader_block) || elsewhere(cell->other_reader_block)) {
        problem = "another block reads it";
      } else if (cell->constant_block >= first) {
        other_block = cell->constant_block;
        problem =
            "this launch reads it through load_global, which promises that nobody writes it (load_global_once "
            "promises less)";
      } else if (cell->writer_block == serial && cell->writer_thread != thread &&
                 cell->writer_epoch == barriers_passed) {
        other_block = serial, problem = "another thread writes it too, with no block barrier between them";
      } else if (cell->reader_block == serial && cell->reader_thread != thread &&
                 cell->reader_epoch == barriers_passed) {
        other_block = serial, problem = "another thread reads it, with no block barrier between them";
      }
      cell->writer_block = serial, cell->writer_epoch = barriers_passed, cell->writer_thread = uint16_t(thread);
    }
  }
  if (problem) {
    finding("global race", thread, at, "store_global of %u bytes at byte %ld of a tensor: %s (block number %ld)", bytes,
            long(address - range.begin), problem, long(other_block - launch->first_serial));
  }
}

}  // namespace dinov3_ext::emulator
