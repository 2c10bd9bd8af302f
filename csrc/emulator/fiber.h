// Switching between the stacks of CUDA threads: 8 ns where hand-written (x86-64), 180 ns through ucontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(DINOV3_EXT_UCONTEXT)
#define DINOV3_EXT_SWITCH  // hand-written
#else
#include <ucontext.h>
#endif

namespace dinov3_ext::emulator {

struct Context {
#if defined(DINOV3_EXT_SWITCH)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
#endif
};

// Makes `to` start `entry` (which never returns) on a stack of `size` bytes whose lowest address is `stack`.
void prepare(Context& to, void* stack, size_t size, void (*entry)());
// Goes on in `to`; returns when someone switches to `from`. `last`: `from` is never entered again.
void switch_context(Context& from, Context& to, bool last = false);
// To be called first by a stack that was entered for the first time.
void entered();

}  // namespace dinov3_ext::emulator
