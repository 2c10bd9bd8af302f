#include "emulator/faults.h"

#include <signal.h>

#include <memory>
#include <mutex>

#include "emulator/runtime.h"

namespace dinov3_ext::emulator {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS};
constexpr size_t kHandlerStackBytes = 64 << 10;

std::mutex lock;
int users = 0;
struct sigaction before[2];

// Leaves through a change of stacks where the kernel is at fault: allowed, since such a signal comes from the faulting
// instruction itself, never from the midst of the C library's bookkeeping.
void handle(int number, siginfo_t* information, void* context) {
  if (worker) worker->fault(information->si_addr);
  const struct sigaction& other = before[number == SIGBUS];
  if (other.sa_flags & SA_SIGINFO) return other.sa_sigaction(number, information, context);
  if (other.sa_handler != SIG_DFL && other.sa_handler != SIG_IGN) return other.sa_handler(number);
  signal(number, SIG_DFL);  // the instruction runs again, and ends the process
}

// Of its own for every thread, kept until the thread ends: a stack may have overflowed.
struct HandlerStack {
  std::unique_ptr<char[]> memory{new char[kHandlerStackBytes]};
  stack_t replaced{};
  HandlerStack() {
    stack_t mine{};
    mine.ss_sp = memory.get(), mine.ss_size = kHandlerStackBytes;
    sigaltstack(&mine, &replaced);
  }
  ~HandlerStack() { sigaltstack(&replaced, nullptr); }
};

}  // namespace

CatchFaults::CatchFaults() {
  thread_local const HandlerStack stack;
  const std::lock_guard guard(lock);
  if (users++) return;
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &before[i]);
}

CatchFaults::~CatchFaults() {
  const std::lock_guard guard(lock);
  if (--users) return;
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &before[i], nullptr);
}

}  // namespace dinov3_ext::emulator
