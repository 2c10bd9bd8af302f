// Arrays of the driver: the same numbers in host memory (for the CPU kernels and the double-precision results) and on
// the device: a GPU, or in the emulator's build memory of its own that kernels may touch only inside the array.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "core/element.h"
#if defined(DINOV3_EXT_EMULATOR)
#include "emulator/memory.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace driver {

using dinov3_ext::Element;

inline int bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }
inline const char* name_of(Element element) {
  return element == Element::float32 ? "float32" : element == Element::bfloat16 ? "bfloat16" : "float16";
}
// Distance of neighbouring numbers of the type at `magnitude`.
inline double spacing(Element element, double magnitude) {
  const int digits = element == Element::float32 ? 23 : element == Element::bfloat16 ? 7 : 10;
  return magnitude > 0 ? std::ldexp(1.0, std::ilogb(magnitude) - digits) : 0.0;
}

inline double read(Element element, const void* from, int64_t index) {
  if (element == Element::float32) return static_cast<const float*>(from)[index];
  const uint16_t bits = static_cast<const uint16_t*>(from)[index];
  if (element == Element::float16) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return double(value);
  }
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline void write(Element element, void* to, int64_t index, double value) {
  if (element == Element::float32) {
    static_cast<float*>(to)[index] = float(value);
  } else if (element == Element::float16) {
    const auto half = _Float16(value);
    std::memcpy(static_cast<uint16_t*>(to) + index, &half, 2);
  } else {
    const auto single = float(value);
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    static_cast<uint16_t*>(to)[index] = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

inline void check(int status, const char* what);

class Array {
 public:
  // An output: all bits set, NaN for every type.
  Array(Element element, int64_t count) : Array(element, count, /*writable=*/true) {
    std::memset(host_.data(), 0xff, host_.size());
    upload();
  }
  // An input with the values of `value(index)`, rounded.
  template <class Value>
  Array(Element element, int64_t count, Value value) : Array(element, count, /*writable=*/false) {
    for (int64_t i = 0; i < count; ++i) write(element, host_.data(), i, value(i));
    upload();
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() {
    live().erase(this);
#if defined(DINOV3_EXT_EMULATOR)
    std::free(device_);
#else
    cudaFree(device_);
#endif
  }

  template <class T = void>
  T* host() {
    return reinterpret_cast<T*>(host_.data());
  }
  template <class T = void>
  T* device() {
    return static_cast<T*>(device_);
  }
  int64_t size() const { return count_; }
  Element element() const { return element_; }
  double operator[](int64_t index) const { return read(element_, host_.data(), index); }
  std::vector<double> host_values() const { return values(host_.data()); }
  std::vector<double> device_values() const {
    std::vector<unsigned char> copy(host_.size());
#if defined(DINOV3_EXT_EMULATOR)
    std::memcpy(copy.data(), device_, copy.size());
#else
    check(cudaMemcpy(copy.data(), device_, copy.size(), cudaMemcpyDeviceToHost), "copy to the host");
#endif
    return values(copy.data());
  }

  // New values on the device.
  template <class Value>
  void overwrite(Value value) {
    for (int64_t i = 0; i < count_; ++i) write(element_, host_.data(), i, value(i));
    upload();
  }

  // Calls start(stream) -> status as one operation in which kernels may touch all arrays that live.
  template <class Start>
  static void launch(const char* what, Start start) {
#if defined(DINOV3_EXT_EMULATOR)
    const dinov3_ext::emulator::Operation scope;
    for (const Array* array : live()) {
      dinov3_ext::emulator::announce(array->device_, int64_t(array->host_.size()), array->writable_);
    }
    check(start(nullptr), what);
#else
    check(start(nullptr), what);
    check(cudaDeviceSynchronize(), what);
#endif
  }

 private:
  Array(Element element, int64_t count, bool writable)
      : element_(element), count_(count), writable_(writable), host_(size_t(count * bytes_of(element))) {
#if defined(DINOV3_EXT_EMULATOR)
    device_ = std::aligned_alloc(256, (host_.size() + 511) / 256 * 256);
#else
    check(cudaMalloc(&device_, host_.size() + 256), "allocation");
#endif
    live().insert(this);
  }
  static std::set<const Array*>& live() {
    static std::set<const Array*> all;
    return all;
  }
  void upload() {
#if defined(DINOV3_EXT_EMULATOR)
    std::memcpy(device_, host_.data(), host_.size());
#else
    check(cudaMemcpy(device_, host_.data(), host_.size(), cudaMemcpyHostToDevice), "copy to the device");
#endif
  }
  std::vector<double> values(const void* from) const {
    std::vector<double> found(static_cast<size_t>(count_));
    for (int64_t i = 0; i < count_; ++i) found[size_t(i)] = read(element_, from, i);
    return found;
  }

  Element element_;
  int64_t count_;
  bool writable_;
  std::vector<unsigned char> host_;
  void* device_ = nullptr;
};

// Normal numbers, the same for a seed on every machine.
class Normal {
 public:
  explicit Normal(uint64_t seed, double scale = 1.0) : state_(seed * 0x9e3779b97f4a7c15ull + 1), scale_(scale) {}
  double operator()(int64_t = 0) {
    const double radius = std::sqrt(-2 * std::log(uniform())), angle = 2 * M_PI * uniform();
    return scale_ * radius * std::cos(angle);
  }
  double uniform() {  // in (0, 1]
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return double((state_ >> 11) + 1) * 0x1p-53;
  }

 private:
  uint64_t state_;
  double scale_;
};

}  // namespace driver
