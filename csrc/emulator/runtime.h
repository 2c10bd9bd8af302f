// The emulated device: runs one block at a time per worker (operating-system thread), one fiber per CUDA thread, and
// checks what they do. The first finding stops the launch: run() returns kFinding, and cuda_status_text has the report.
#pragma once

#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

#include "core/element.h"
#include "emulator/counters.h"
#include "emulator/fiber.h"
#include "emulator/shadow.h"

namespace dinov3_ext::emulator {

using Location = std::source_location;

inline constexpr int kFinding = 999;              // cudaErrorUnknown
inline constexpr uint32_t kSharedBase = 1024;     // not 0: an address without the base is found
inline constexpr int kMaxSharedBytes = 232448;    // of a block on sm_90; the smaller limits are the launchers' business
inline constexpr size_t kMostAccesses = 1 << 16;  // remembered of one thread between two collectives
inline constexpr size_t kGuardBytes = 4096;
inline constexpr size_t kStackBytes = 256 << 10;  // of one CUDA thread, touched as needed

struct Options {
  uint64_t seed = 0;        // 0: fibers and blocks in order; else a random schedule of that number
  bool copies_late = true;  // copy_async delivers at the wait, else at once
  bool whole_tiles = true;  // products of tile.cuh in one step of the warp
  bool races = true;
  bool truncate = false;  // products round as tensor cores do, else to nearest after each
  int threads = 1;        // workers
};
extern Options options;
inline bool whole_tiles() { return options.whole_tiles; }

// Runs `body` for every thread of every block. 0, or kFinding (also at once while a finding of this op is unread).
int run(const char* name, int64_t x, int64_t y, int64_t z, int threads, int shared_bytes,
        const std::function<void()>& body);

// A call of block_barrier, warp_barrier or copy_async_wait in the sources.
struct Site {
  const char* word = nullptr;
  Location where;
  int64_t reached = 0;
  bool operator==(const Site& other) const {
    return where.line() == other.where.line() && where.column() == other.where.column() &&
           __builtin_strcmp(where.file_name(), other.where.file_name()) == 0;
  }
};

// What makes one site do nothing, or a copy_async_wait wait for one group fewer (tests/emulator/test_mutants.py).
struct Mutant {
  std::string file;  // its last part, as site_file() gives it
  uint32_t line = 0, column = 0;
  std::string kernel;  // only in kernels whose name contains this
  bool short_wait = false;
};
const char* site_file(const Location& where);  // below csrc or tests

// A memory access of one thread, kept until its warp's accesses are put together again as warp instructions.
struct Access {
  enum Kind : uint8_t { shared_read, shared_write, copy_to, global_read, global_write };
  uint64_t address;
  uint32_t site;
  uint8_t bytes;
  Kind kind;
};

struct Fiber {
  Context context;
  std::vector<Access> accesses;
  const char* waits_for = nullptr;
  Location where;
  const char* passed = nullptr;  // the last barrier or wait
  Location passed_where;
  int64_t committed = 0;  // groups of asynchronous copies
  struct Copy {
    uint32_t to;
    bool valid;
    int64_t group;
    const void* from;
  };
  std::vector<Copy> copies;  // under way, oldest first, from `first_copy` on
  size_t first_copy = 0;
};

struct Warp {
  uint32_t runnable = 0, at_block_barrier = 0, returned = 0;
  uint32_t epoch = 0;
  int arrived = 0;  // at the collective `word`
  const char* word = nullptr;
  Location where;
  void* operand[32];
};

struct Range {  // of announced memory
  uintptr_t begin, end;
  bool writable, shares_writable;  // the second: also where it overlaps a range that is
};

struct Launch {
  std::string kernel;
  int64_t grid[3];
  int threads, shared_bytes;
  const std::function<void()>* body;
  const std::vector<Range>* ranges;
  uint32_t number;        // never given twice
  uint32_t first_serial;  // of its block 0
  bool several_workers, races, copies_late;
};

struct Page;

struct Worker {
  // ---- who am I
  int thread = 0;
  int64_t block[3] = {}, grid[3] = {};

  // ---- called by the primitives
  void block_barrier(const Location& at);
  void warp_barrier(const Location& at);
  void copy_async(uint32_t to, const void* from, bool valid, const Location& at);
  void copy_async_commit() { ++fibers[thread].committed; }
  void copy_async_wait(int pending, const Location& at);
  void check_shared(uint32_t address, uint32_t bytes, bool write, int by_thread, const Location& at);
  uint8_t* shared_at(uint32_t address) { return shared.data() + (address - kSharedBase); }
  // constant: read by load_global, which promises that nobody writes while the kernel runs
  void check_global_read(const void* from, uint32_t bytes, bool constant, const char* word, const Location& at);
  void check_global_write(void* to, uint32_t bytes, const Location& at);
  void note(Access::Kind kind, uint64_t address, uint32_t bytes, const Location& at) {
    std::vector<Access>& log = fibers[thread].accesses;
    if (log.size() >= kMostAccesses) [[unlikely]]
      count_one_by_one(log);
    log.push_back({address, at.line() << 10 ^ at.column() ^ uint32_t(reinterpret_cast<uintptr_t>(at.file_name())),
                   uint8_t(bytes), kind});
  }
  void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed, const Location& at);
  // d: [tiles][4]; a: [4]; b: [tiles][2]
  void product_of_registers(const char* word, Element element, int tiles, float* d, const uint32_t* a,
                            const uint32_t* b, const Location& at);
  // r[lane]: where its four registers go
  void spread_matrices(const uint32_t (&address)[32], uint32_t* const (&r)[32], bool transposed, const Location& at);
  // d[lane]: [left_tiles][right_tiles][4]; a[lane]: [left_tiles][depth][4]; addresses: [depth][right_tiles / 2][lane]
  void product(Element element, bool transposed, int left_tiles, int right_tiles, int depth, float* const (&d)[32],
               const uint32_t* const (&a)[32], const uint32_t (*addresses)[32], const Location& at);

  // All 32 lanes of the warp hand in an operand; the last one to arrive runs execute(operands).
  template <class Operand, class Execute>
  void collective(const char* word, Operand& operand, const Location& at, Execute execute) {
    Warp& warp = warps[thread >> 5];
    if (!join(warp, word, &operand, at)) return;
    execute(reinterpret_cast<Operand* const*>(warp.operand));
    release(warp);
  }

  // ---- findings: the report, then the block is abandoned
  [[noreturn]] void finding(const char* kind, int by_thread, const Location& at, const char* format, ...)
      __attribute__((format(printf, 5, 6)));

  // Called by the signal handler: a finding where a kernel runs, else nothing.
  void fault(const void* address);

  // ---- the running block
  const Launch* launch = nullptr;
  int threads = 0, returned = 0, at_barrier = 0;
  uint32_t shared_bytes = 0;
  uint32_t epoch = 0, barriers_passed = 0;
  uint32_t serial = 0;  // of the block, never given twice
  Location barrier_where;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  Shadow shadow;
  Counters counters;
  std::vector<Site> sites;
  const Mutant* mutant = nullptr;
  bool failed = false;
  std::string report;

  void run_block(const Launch& what, int64_t index);
  bool mutated(const char* word, const Location& at);  // notes the site too
  Moment moment(int by_thread) const { return {epoch, warps[by_thread >> 5].epoch, by_thread}; }

 private:
  friend void fiber_main();
  bool join(Warp& warp, const char* word, void* operand, const Location& at);
  void release(Warp& warp);
  void release_block_barrier();
  void wait(const char* word, const Location& at);
  void go_on(bool last);
  int pick();
  void finished();
  uint32_t random_below(uint32_t bound);
  void conflict(const Conflict& what, uint32_t address, uint32_t bytes, bool write, int by_thread, const Location& at);
  void matrix_wavefronts(const uint32_t (&address)[32]);
  Page& page_of(uintptr_t address);
  const Range& range_of(uintptr_t address, uint32_t bytes, bool write, const char* word, const Location& at);
  void deliver(const Fiber::Copy& copy);
  void read_lines(const uint32_t (&address)[32], const Location& at);
  void count_accesses(int warp);
  void count_one_by_one(std::vector<Access>& accesses);
  void count_instruction(const Access* const* lanes, int count);

  Context main_;
  bool in_kernel_ = false;
  std::vector<void*> stacks_;
  uint64_t random_ = 0;
  uint32_t runnable_warps_ = 0;
  std::vector<float> left_, right_, sums_;  // operands of a product, unpacked
  struct CachedPage {
    uintptr_t number = 0;
    Page* page = nullptr;
  };
  std::vector<CachedPage> pages_;

 public:
  void forget_pages() { pages_.assign(1024, {}); }
  ~Worker();
};

// The worker of this operating-system thread while it runs a block. A plain pointer at a fixed offset: no call.
extern __thread Worker* worker __attribute__((tls_model("initial-exec")));

// ---- results, for csrc/emulator/module.cpp
// -----------------------------------------------------------------------------------------

std::vector<std::pair<std::string, Counters>> all_counters();
void reset_counters();
std::string last_report();
struct SiteReached {
  Site site;
  std::vector<std::string> kernels;
};
std::vector<SiteReached> all_sites();
void set_mutant(const Mutant* mutant);  // a copy is kept; null: none

}  // namespace dinov3_ext::emulator
