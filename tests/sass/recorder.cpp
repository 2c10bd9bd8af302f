// A CUDA runtime that runs nothing and writes down every launch: kernel, grid, block, shared memory, argument bytes.
//
// Linked with the objects nvcc makes of the .cu files and with the binding, it turns the public functions, called with
// CPU tensors of any size, into a list of what a GPU would have been asked to run. It stands in for a GPU of the
// architecture that record_begin names. No CUDA header: the entry points below are those that nvcc's own code calls.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include "core/architecture.h"
#include "core/cuda_status.h"
#include "emulator/memory.h"

namespace {

struct Dim3 {
  unsigned x, y, z;
};

struct Recorder {
  std::map<const void*, std::string> symbols;  // host function -> name in the cubin
  std::map<const void*, int> shared_limit;     // host function -> dynamic shared memory it was allowed
  Dim3 grid{}, block{};
  size_t shared = 0;
  int architecture = 90;
  std::string lines;
};

Recorder& recorder() {
  static Recorder one;
  return one;
}

struct Parameter {
  int offset, size;
};
std::map<std::string, std::map<int, Parameter>>& parameters() {  // symbol -> ordinal -> place
  static std::map<std::string, std::map<int, Parameter>> all;
  return all;
}

constexpr int kInvalidValue = 1;
constexpr size_t kSharedWithoutAsking = 48 * 1024;

int record(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared) {
  Recorder& r = recorder();
  const std::string& symbol = r.symbols[function];
  const size_t allowed = r.shared_limit.count(function) ? r.shared_limit[function] : kSharedWithoutAsking;
  if (shared > allowed || block.x > 1024 || grid.y > 65535 || grid.z > 65535) return kInvalidValue;
  std::string bytes;
  for (const auto& [ordinal, place] : parameters()[symbol]) {
    if (size_t(place.offset + place.size) * 2 > bytes.size()) bytes.resize(size_t(place.offset + place.size) * 2, '0');
    const auto* from = static_cast<const unsigned char*>(arguments[ordinal]);
    for (int i = 0; i < place.size; ++i) {
      char two[3];
      std::snprintf(two, sizeof two, "%02x", from[i]);
      std::memcpy(&bytes[size_t(place.offset + i) * 2], two, 2);
    }
  }
  char line[256];
  std::snprintf(line, sizeof line, " %u %u %u %u %u %u %zu ", grid.x, grid.y, grid.z, block.x, block.y, block.z,
                shared);
  r.lines += symbol + line + (bytes.empty() ? "-" : bytes) + "\n";
  return 0;
}

}  // namespace

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// ---- for tests/sass/launches.py ----

EXPORTED void record_begin(int architecture) {
  recorder().architecture = architecture;
  recorder().shared_limit.clear();
  dinov3_ext::emulated_architecture().store(architecture);
  recorder().lines.clear();
}
EXPORTED void record_parameter(const char* symbol, int ordinal, int offset, int size) {
  parameters()[symbol][ordinal] = {offset, size};
}
// Lines of: "tensor", address, bytes, for each tensor handed to a launcher; and of: symbol, grid x y z, block x y z,
// dynamic shared bytes, argument bytes in hexadecimal. Until the next call.
EXPORTED const char* record_lines() { return recorder().lines.c_str(); }

// ---- what nvcc's own code calls ----

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  recorder().symbols[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void*) {
  recorder().grid = grid, recorder().block = block, recorder().shared = shared;
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = recorder().grid, *block = recorder().block, *shared = recorder().shared;
  *static_cast<void**>(stream) = nullptr;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  return record(kernel, grid, block, arguments, shared);
}
int cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  return record(function, grid, block, arguments, shared);
}

// ---- what the launchers call ----

int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  constexpr int kMaxDynamicSharedMemorySize = 8;
  if (attribute == kMaxDynamicSharedMemorySize) {
    if (value > dinov3_ext::shared_bytes_per_block(recorder().architecture)) return kInvalidValue;
    recorder().shared_limit[function] = value;
  }
  return 0;
}
int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  const int architecture = recorder().architecture;
  switch (attribute) {
    case 8: *value = 48 * 1024; return 0;           // shared memory per block
    case 75: *value = architecture / 10; return 0;  // compute capability
    case 76: *value = architecture % 10; return 0;
    case 97: *value = dinov3_ext::shared_bytes_per_block(architecture); return 0;  // shared memory per block, asked for
    default: return kInvalidValue;
  }
}

}  // extern "C"

namespace dinov3_ext {

namespace emulator {

void announce(const void* data, int64_t bytes, bool) {
  char line[64];
  std::snprintf(line, sizeof line, "tensor %llu %lld\n", static_cast<unsigned long long>(uintptr_t(data)),
                static_cast<long long>(bytes));
  recorder().lines += line;
}
void poison(void*, int64_t) {}  // nothing reads it
Operation::Operation() {}
Operation::~Operation() {}

}  // namespace emulator

const char* cuda_status_text(int) { return "refused by the recorder: more shared memory or blocks than that GPU has"; }

}  // namespace dinov3_ext
