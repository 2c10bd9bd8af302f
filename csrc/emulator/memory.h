// Which global memory a kernel may touch: what csrc/binding/device.h tells the emulator.
#pragma once

#include <cstdint>

namespace dinov3_ext::emulator {

// `bytes` bytes from `data` on may be read by the kernels of the running op, and written where `writable`.
void announce(const void* data, int64_t bytes, bool writable);
// What a kernel is handed for `data`: an address that no processor can use, so that only the words of the vocabulary,
// which check it, reach the memory. Null stays null.
inline constexpr uintptr_t kDeviceTag = uintptr_t(1) << 52;
template <class T>
T* device_pointer(T* data) {
  return data ? reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(data) | kDeviceTag) : data;
}
template <class T>
T* host_pointer(T* data) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(data) & ~kDeviceTag);
}

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
