#include "emulator/fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(DINOV3_EXT_SWITCH)
// Callee-saved registers on the old stack, the stack pointer swapped, the same registers off the new one.
extern "C" void dinov3_ext_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl dinov3_ext_emulator_switch
.hidden dinov3_ext_emulator_switch
.type dinov3_ext_emulator_switch, @function
dinov3_ext_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dinov3_ext_emulator_switch, .-dinov3_ext_emulator_switch
)");
#endif

namespace dinov3_ext::emulator {

void prepare(Context& to, void* stack, size_t size, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, size);  // what an abandoned block left behind
  to.bottom = stack, to.size = size, to.fake_stack = nullptr;
#endif
#if defined(DINOV3_EXT_SWITCH)
  // At the entry of a function the stack pointer is 8 behind a multiple of 16: six registers, then the return address.
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + size) - 2;
  *top = reinterpret_cast<void*>(entry);
  for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
  to.stack_pointer = top - 6;
#else
  getcontext(&to.context);
  to.context.uc_stack.ss_sp = stack;
  to.context.uc_stack.ss_size = size;
  to.context.uc_link = nullptr;
  makecontext(&to.context, entry, 0);
#endif
}

#if defined(__SANITIZE_ADDRESS__)
namespace {
thread_local Context* left = nullptr;  // the context that was left last: its stack's bounds are learnt on arrival

void arrived(void* fake_stack) {
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
  if (left) left->bottom = bottom, left->size = size;
}
}  // namespace
#endif

void switch_context(Context& from, Context& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  left = &from;
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#if defined(DINOV3_EXT_SWITCH)
  dinov3_ext_emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  arrived(from.fake_stack);
#endif
}

void entered() {
#if defined(__SANITIZE_ADDRESS__)
  arrived(nullptr);
#endif
}

}  // namespace dinov3_ext::emulator
