// Blocks, fibers, barriers, collectives, shared memory and asynchronous copies.
#include "emulator/runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>

#include "core/cuda_status.h"
#include "emulator/faults.h"
#include "emulator/memory.h"
#include "emulator/memory_pages.h"

namespace dinov3_ext {

namespace emulator {

Options options;
__thread Worker* worker __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

std::mutex device;  // held by the launch that runs: one at a time, as on one stream
std::vector<std::unique_ptr<Worker>> workers;
std::map<std::string, Counters> counters_of_kernels;
std::vector<SiteReached> sites_reached;
Mutant mutant;
bool mutant_set = false;
std::string report;
uint32_t launches = 0, next_serial = 1;

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// "gram_forward<Element::bfloat16, 64>" from the signature of launch<Kernel>.
std::string kernel_name(const std::string& signature) {
  const std::string start = "auto Kernel = ";
  const size_t begin = signature.find(start);
  if (begin == std::string::npos) return signature;
  size_t end = begin + start.size();
  for (int depth = 0; end < signature.size(); ++end) {
    const char c = signature[end];
    if (c == '<' || c == '(' || c == '{') ++depth;
    if (depth == 0 && (c == ';' || c == ']' || c == ',')) break;
    if (c == '>' || c == ')' || c == '}') --depth;
  }
  std::string name = signature.substr(begin + start.size(), end - begin - start.size());
  for (const char* prefix : {"dinov3_ext::", "{anonymous}::", "(anonymous namespace)::", "Element::"}) {
    for (size_t at; (at = name.find(prefix)) != std::string::npos;) name.erase(at, std::strlen(prefix));
  }
  return name;
}

bool same_place(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

}  // namespace

const char* site_file(const Location& where) {
  for (const char* folder : {"csrc/", "tests/"}) {
    if (const char* found = std::strstr(where.file_name(), folder)) return found;
  }
  return where.file_name();
}

void fiber_main() {
  entered();
  (*worker->launch->body)();
  worker->finished();
  __builtin_unreachable();
}

// ---- findings
// -------------------------------------------------------------------------------------------------------------

void Worker::finding(const char* kind, int by_thread, const Location& at, const char* format, ...) {
  char text[3000];
  int length =
      std::snprintf(text, sizeof text, "%s in %s, block (%ld, %ld, %ld), thread %d (warp %d, lane %d), %s:%u: ", kind,
                    launch->kernel.c_str(), long(block[0]), long(block[1]), long(block[2]), by_thread, by_thread >> 5,
                    by_thread & 31, site_file(at), unsigned(at.line()));
  va_list arguments;
  va_start(arguments, format);
  length = std::min(length, int(sizeof text) - 1);
  length += std::vsnprintf(text + length, sizeof text - size_t(length), format, arguments);
  va_end(arguments);
  const Fiber& fiber = fibers[by_thread];
  if (fiber.passed && length < int(sizeof text)) {
    std::snprintf(text + length, sizeof text - size_t(length), "; its last barrier or wait: %s at %s:%u", fiber.passed,
                  site_file(fiber.passed_where), unsigned(fiber.passed_where.line()));
  }
  report.assign(text);
  failed = true;
  switch_context(fibers[thread].context, main_, /*last=*/true);
  __builtin_unreachable();
}

void Worker::conflict(const Conflict& what, uint32_t address, uint32_t bytes, bool write, int by_thread,
                      const Location& at) {
  finding("race", by_thread, at,
          "%s %u bytes of shared memory at byte %u that thread %d (warp %d, lane %d) %s, with no barrier between them",
          write ? "writes" : "reads", bytes, address - kSharedBase, what.other, what.other >> 5, what.other & 31,
          what.kind == Conflict::write_after_read ? "reads" : "writes");
}

void Worker::fault(const void* address) {
  if (!in_kernel_) return;
  in_kernel_ = false;  // a fault while reporting one is the process's end
  const char* stack = static_cast<const char*>(stacks_[size_t(thread)]);
  if (address >= stack && address < stack + kGuardBytes) {
    finding("stack overflow", thread, Location::current(), "the local variables of a thread need more than %zu bytes",
            kStackBytes);
  }
  finding(
      "plain pointer", thread, Location::current(),
      "follows a plain pointer (null, or into global memory, which only load_global, load_global_once, store_global "
      "and copy_async reach)");
}

// ---- scheduling
// -----------------------------------------------------------------------------------------------------------

uint32_t Worker::random_below(uint32_t bound) {
  random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
  return uint32_t((random_ >> 32) * bound >> 32);
}

// The thread to go on with, or -1. In order: the next lane of this warp, else of the next warp.
int Worker::pick() {
  if (!runnable_warps_) return -1;
  auto nth_bit = [](uint32_t mask, uint32_t n) {
    while (n--) mask &= mask - 1;
    return __builtin_ctz(mask);
  };
  if (options.seed) {
    const int w = nth_bit(runnable_warps_, random_below(uint32_t(__builtin_popcount(runnable_warps_))));
    const uint32_t lanes = warps[w].runnable;
    return 32 * w + nth_bit(lanes, random_below(uint32_t(__builtin_popcount(lanes))));
  }
  int w = thread >> 5;
  if (!(runnable_warps_ >> w & 1)) {
    const uint32_t behind = runnable_warps_ & ~((2u << w) - 1);
    w = __builtin_ctz(behind ? behind : runnable_warps_);
  }
  return 32 * w + __builtin_ctz(warps[w].runnable);
}

// Leaves the running fiber for another one, or, where none can run, the block.
void Worker::go_on(bool last) {
  Fiber& self = fibers[thread];
  const int next = pick();
  if (next == thread) return;
  if (next >= 0) {
    thread = next;
    switch_context(self.context, fibers[next].context, last);
    return;
  }
  if (returned == threads) {
    switch_context(self.context, main_, last);
    return;
  }
  // Nobody can run: say who waits for what.
  char text[2000];
  int length = 0, first = -1;
  for (int t = 0; t < threads; ++t) {
    const Fiber& fiber = fibers[t];
    if (!fiber.waits_for) continue;
    if (first < 0) first = t;
    bool listed = false;
    int count = 0;
    for (int other = 0; other < threads; ++other) {
      const bool same = fibers[other].waits_for && std::strcmp(fibers[other].waits_for, fiber.waits_for) == 0 &&
                        same_place(fibers[other].where, fiber.where);
      listed |= same && other < t;
      count += same;
    }
    if (listed || length > 1800) continue;
    length +=
        std::snprintf(text + length, sizeof text - size_t(length), "%s%d thread%s (first: %d) wait%s in %s at %s:%u",
                      length ? "; " : "", count, count == 1 ? "" : "s", t, count == 1 ? "s" : "", fiber.waits_for,
                      site_file(fiber.where), unsigned(fiber.where.line()));
  }
  finding("deadlock", first, fibers[first].where, "%s; %d of %d threads have returned", text, returned, threads);
}

void Worker::wait(const char* word, const Location& at) {
  Fiber& self = fibers[thread];
  self.waits_for = word, self.where = at;
  Warp& warp = warps[thread >> 5];
  warp.runnable &= ~(1u << (thread & 31));
  if (!warp.runnable) runnable_warps_ &= ~(1u << (thread >> 5));
  go_on(/*last=*/false);
}

void Worker::finished() {
  Warp& warp = warps[thread >> 5];
  if (warp.arrived) {
    finding("divergent collective", thread, warp.where, "returns, while other lanes of the warp are in %s", warp.word);
  }
  const uint32_t bit = 1u << (thread & 31);
  warp.runnable &= ~bit, warp.returned |= bit;
  if (!warp.runnable) runnable_warps_ &= ~(1u << (thread >> 5));
  ++returned;
  if (at_barrier && at_barrier + returned == threads) release_block_barrier();
  go_on(/*last=*/true);
  __builtin_unreachable();
}

bool Worker::join(Warp& warp, const char* word, void* operand, const Location& at) {
  if (warp.returned) {
    finding("divergent collective", thread, at, "%s by a warp whose lane %d has returned", word,
            __builtin_ctz(warp.returned));
  }
  if (!warp.arrived) {
    warp.word = word, warp.where = at;
  } else if (std::strcmp(warp.word, word) != 0 || !same_place(warp.where, at)) {
    finding("divergent collective", thread, at, "%s, while other lanes of the warp are in %s at %s:%u", word, warp.word,
            site_file(warp.where), unsigned(warp.where.line()));
  }
  warp.operand[thread & 31] = operand;
  if (++warp.arrived == 32) return true;
  wait(word, at);
  return false;
}

void Worker::release(Warp& warp) {
  const int w = int(&warp - warps.data());
  count_accesses(w);
  warp.arrived = 0;
  for (int i = 0; i < 32; ++i) fibers[32 * w + i].waits_for = nullptr;
  warp.runnable = ~0u;
  runnable_warps_ |= 1u << w;
  if (options.seed) go_on(/*last=*/false);
}

bool Worker::mutated(const char* word, const Location& at) {
  fibers[thread].passed = word, fibers[thread].passed_where = at;
  Site site{word, at};
  const auto found = std::find(sites.begin(), sites.end(), site);
  if (found == sites.end()) {
    site.reached = 1;
    sites.push_back(site);
  } else {
    ++found->reached;
  }
  return mutant && mutant->line == at.line() && mutant->column == at.column() && mutant->file == site_file(at) &&
         launch->kernel.find(mutant->kernel) != std::string::npos;
}

void Worker::release_block_barrier() {
  at_barrier = 0;
  ++epoch, ++barriers_passed, ++counters.block_barriers;
  for (int w = 0; w < threads / 32; ++w) {
    Warp& warp = warps[w];
    count_accesses(w);
    for (uint32_t lanes = warp.at_block_barrier; lanes; lanes &= lanes - 1) {
      fibers[32 * w + __builtin_ctz(lanes)].waits_for = nullptr;
    }
    warp.runnable |= warp.at_block_barrier, warp.at_block_barrier = 0;
    if (warp.runnable) runnable_warps_ |= 1u << w;
  }
}

void Worker::block_barrier(const Location& at) {
  if (mutated("block_barrier", at)) return;
  if (at_barrier && !same_place(barrier_where, at)) {
    finding("divergent barrier", thread, at, "block_barrier, while other threads of the block are in that at %s:%u",
            site_file(barrier_where), unsigned(barrier_where.line()));
  }
  barrier_where = at;
  warps[thread >> 5].at_block_barrier |= 1u << (thread & 31);
  ++at_barrier;
  if (at_barrier + returned < threads) return wait("block_barrier", at);
  release_block_barrier();
  if (options.seed) go_on(/*last=*/false);
}

void Worker::warp_barrier(const Location& at) {
  if (mutated("warp_barrier", at)) return;
  Warp& warp = warps[thread >> 5];
  collective("warp_barrier", warp, at, [](Warp* const* lanes) {
    ++lanes[0]->epoch;
    ++worker->counters.warp_barriers;
  });
}

// ---- shared memory
// --------------------------------------------------------------------------------------------------------

void Worker::check_shared(uint32_t address, uint32_t bytes, bool write, int by_thread, const Location& at) {
  const uint32_t offset = address - kSharedBase;
  const char* verb = write ? "writes" : "reads";
  if (offset > shared_bytes || shared_bytes - offset < bytes) [[unlikely]] {
    finding("out of bounds", by_thread, at, "%s %u bytes of shared memory at byte %d; the block has %u", verb, bytes,
            int(offset), shared_bytes);
  }
  if (offset % bytes) [[unlikely]] {
    finding("misaligned", by_thread, at, "%s %u bytes of shared memory at byte %u", verb, bytes, offset);
  }
  if (!launch->races) return;
  const Chunk& chunk = shadow.chunk(offset);
  if (chunk.in_flight == serial) [[unlikely]] {
    finding("race", by_thread, at,
            "%s %u bytes of shared memory at byte %u, to which a copy_async of thread %d (warp %d, lane %d) is under "
            "way: no copy_async_wait has ended it",
            verb, bytes, offset, chunk.owner, chunk.owner >> 5, chunk.owner & 31);
  }
  const Moment now = moment(by_thread);
  const Conflict met = write ? shadow.write(offset, bytes, now) : shadow.read(offset, bytes, now);
  if (met.kind) [[unlikely]]
    conflict(met, address, bytes, write, by_thread, at);
}

void Worker::copy_async(uint32_t to, const void* from, bool valid, const Location& at) {
  Fiber& self = fibers[thread];
  if (reinterpret_cast<uintptr_t>(from) % 16) {
    finding("misaligned", thread, at, "copy_async reads 16 bytes of global memory at %p", from);
  }
  if (valid) check_global_read(from, 16, /*constant=*/false, "copy_async", at);
  check_shared(to, 16, /*write=*/true, thread, at);
  note(Access::copy_to, to, 16, at);
  if (launch->races) {
    Chunk& chunk = shadow.chunk(to - kSharedBase);
    chunk.in_flight = serial, chunk.owner = uint16_t(thread);
  }
  const Fiber::Copy copy{to, valid, self.committed, host_pointer(from)};
  if (launch->copies_late) {
    std::memset(shared_at(to), 0xff, 16);
  } else {
    deliver(copy);
  }
  self.copies.push_back(copy);
}

void Worker::deliver(const Fiber::Copy& copy) {
  if (copy.valid) {
    std::memcpy(shared_at(copy.to), copy.from, 16);
  } else {
    std::memset(shared_at(copy.to), 0, 16);
  }
}

void Worker::copy_async_wait(int pending, const Location& at) {
  if (mutated("copy_async_wait", at)) {
    if (!mutant->short_wait) return;
    ++pending;
  }
  Fiber& self = fibers[thread];
  while (self.first_copy < self.copies.size()) {
    const Fiber::Copy& copy = self.copies[self.first_copy];
    if (copy.group >= self.committed - pending) return;
    ++self.first_copy;
    if (launch->copies_late) deliver(copy);
    if (launch->races) {
      Chunk& chunk = shadow.chunk(copy.to - kSharedBase);
      chunk.in_flight = 0;
      chunk.whole.note_write(moment(thread));  // as if written now: others need a barrier behind the wait
    }
  }
  self.copies.clear(), self.first_copy = 0;
}

// ---- blocks and launches
// ---------------------------------------------------------------------------------------------------

Worker::~Worker() {
  for (void* stack : stacks_) munmap(stack, kStackBytes);
}

void Worker::run_block(const Launch& what, int64_t index) {
  launch = &what;
  threads = what.threads;
  for (int i = 0; i < 3; ++i) grid[i] = what.grid[i];
  block[0] = index % grid[0], block[1] = index / grid[0] % grid[1], block[2] = index / grid[0] / grid[1];
  shared_bytes = uint32_t(what.shared_bytes);
  shared.assign(shared_bytes, 0xff);
  shadow.resize(shared_bytes);
  returned = at_barrier = 0;
  barriers_passed = 0;
  serial = what.first_serial + uint32_t(index);
  ++epoch;
  random_ = mix(options.seed ^ mix(uint64_t(index))) | 1;
  while (int(stacks_.size()) < threads) {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack, kGuardBytes, PROT_NONE);
    stacks_.push_back(stack);
  }
  if (int(fibers.size()) < threads) fibers.resize(size_t(threads));
  warps.assign(size_t(threads / 32), {});
  runnable_warps_ = 0;
  for (int w = 0; w < threads / 32; ++w) warps[w].runnable = ~0u, runnable_warps_ |= 1u << w;
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.waits_for = fiber.passed = nullptr, fiber.committed = 0, fiber.first_copy = 0;
    fiber.copies.clear(), fiber.accesses.clear();
    // Tops of stacks 4 KiB apart would share the same lines of the cache.
    prepare(fiber.context, stacks_[t], kStackBytes - size_t(t % 64) * 64, fiber_main);
  }
  thread = 0;
  thread = pick();
  in_kernel_ = true;
  switch_context(main_, fibers[thread].context);
  in_kernel_ = false;
  for (int w = 0; w < threads / 32; ++w) count_accesses(w);
  ++counters.blocks;
}

int run(const char* name, int64_t x, int64_t y, int64_t z, int threads, int shared_bytes,
        const std::function<void()>& body) {
  const std::lock_guard lock(device);
  if (has_finding()) return kFinding;
  const std::string kernel = kernel_name(name);
  if (x > INT32_MAX || y > 65535 || z > 65535 || x < 0 || y < 0 || z < 0 || threads < 32 || threads > 1024 ||
      threads % 32 || shared_bytes < 0 || shared_bytes > kMaxSharedBytes) {
    report = "invalid launch of " + kernel + ": " + std::to_string(x) + " x " + std::to_string(y) + " x " +
             std::to_string(z) + " blocks of " + std::to_string(threads) + " threads, " + std::to_string(shared_bytes) +
             " bytes of shared memory";
    set_finding();
    return kFinding;
  }
  const int64_t blocks = x * y * z;
  if (int64_t(next_serial) + blocks > INT32_MAX || launches > INT32_MAX) {
    forget_all_pages();
    for (auto& one : workers) one = nullptr;  // and with them every record of shared memory
    workers.clear();
    next_serial = 1, launches = 0;
  }
  const int count = int(std::clamp<int64_t>(options.threads, 1, blocks));
  const Launch launch{.kernel = kernel,
                      .grid = {x, y, z},
                      .threads = threads,
                      .shared_bytes = shared_bytes,
                      .body = &body,
                      .ranges = &announced(),
                      .number = ++launches,
                      .first_serial = next_serial,
                      .several_workers = count > 1,
                      .races = options.races,
                      .copies_late = options.copies_late};
  next_serial += uint32_t(blocks);
  limit_pages();
  while (int(workers.size()) < count) workers.push_back(std::make_unique<Worker>());

  std::vector<int64_t> order;
  if (options.seed) {
    order.resize(size_t(blocks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937_64(options.seed));
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false};
  auto work = [&](Worker& self) {
    const CatchFaults faults;
    Worker* const outer = worker;
    worker = &self;
    self.forget_pages();
    self.failed = false, self.counters = {}, self.sites.clear();
    self.mutant = mutant_set ? &mutant : nullptr;
    for (int64_t i; !stop && (i = next++) < blocks;) {
      self.run_block(launch, options.seed ? order[size_t(i)] : i);
      if (self.failed) stop = true;
    }
    worker = outer;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < count; ++i) others.emplace_back([&, i] { work(*workers[size_t(i)]); });
  work(*workers[0]);
  for (std::thread& other : others) other.join();

  Counters& total = counters_of_kernels[kernel];
  ++total.launches;
  bool failed = false;
  for (int i = 0; i < count; ++i) {
    Worker& one = *workers[size_t(i)];
    total += one.counters;
    for (const Site& site : one.sites) {
      auto found = std::find_if(sites_reached.begin(), sites_reached.end(),
                                [&](const SiteReached& other) { return other.site == site; });
      if (found == sites_reached.end()) {
        sites_reached.push_back({site, {kernel}});
        continue;
      }
      found->site.reached += site.reached;
      if (std::find(found->kernels.begin(), found->kernels.end(), kernel) == found->kernels.end()) {
        found->kernels.push_back(kernel);
      }
    }
    if (one.failed && !failed) report = one.report, failed = true;
  }
  if (failed) set_finding();
  return failed ? kFinding : 0;
}

// ---- results
// --------------------------------------------------------------------------------------------------------------

std::vector<std::pair<std::string, Counters>> all_counters() {
  const std::lock_guard lock(device);
  return {counters_of_kernels.begin(), counters_of_kernels.end()};
}
void reset_counters() {
  const std::lock_guard lock(device);
  counters_of_kernels.clear();
  sites_reached.clear();
}
std::string last_report() {
  const std::lock_guard lock(device);
  return report;
}
std::vector<SiteReached> all_sites() {
  const std::lock_guard lock(device);
  return sites_reached;
}
void set_mutant(const Mutant* one) {
  const std::lock_guard lock(device);
  mutant_set = one != nullptr;
  if (one) mutant = *one;
}
const char* report_text() { return report.c_str(); }

}  // namespace emulator

const char* cuda_status_text(int status) {
  return status == emulator::kFinding ? emulator::report_text() : "no finding of the emulator, but a status of its own";
}

int cuda_runtime_version() { return 0; }

}  // namespace dinov3_ext
