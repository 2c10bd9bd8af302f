// Which global memory a kernel may touch: what csrc/binding/device.h tells the emulator.
#pragma once

#include <cstdint>

namespace dinov3_ext::emulator {

// `bytes` bytes from `data` on may be read by the kernels of the running op, and written where `writable`.
void announce(const void* data, int64_t bytes, bool writable);
// Sets all bits: NaN for every floating type.
void poison(void* data, int64_t bytes);

// The life of announcements: one call of one op.
struct Operation {
  Operation();
  ~Operation();
  Operation(const Operation&) = delete;
};

// `function` as an op of its own: what library.cpp registers.
template <auto function>
struct AsOperation;
template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct AsOperation<function> {
  static Result call(Arguments... arguments) {
    const Operation scope;
    return function(static_cast<Arguments&&>(arguments)...);
  }
};

}  // namespace dinov3_ext::emulator
