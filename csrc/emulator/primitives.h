// The emulator's half of csrc/core/primitives.cuh: the same words, executed on the CPU and checked.
//
// Included by primitives.cuh alone. Where a word takes a source location behind its arguments, it is the caller's: the
// reports name it, and it numbers the barriers and waits for the mutants.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/element.h"
#include "emulator/memory.h"
#include "emulator/runtime.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace dinov3_ext {

// ---- who am I

inline int thread_index() { return emulator::worker->thread; }
inline int lane_index() { return emulator::worker->thread & 31; }
inline int warp_index() { return emulator::worker->thread >> 5; }
template <int Axis>
int64_t block_index() {
  return emulator::worker->block[Axis];
}
template <int Axis>
int64_t grid_size() {
  return emulator::worker->grid[Axis];
}

// ---- order

inline void block_barrier(const emulator::Location& at = emulator::Location::current()) {
  emulator::worker->block_barrier(at);
}
inline void warp_barrier(const emulator::Location& at = emulator::Location::current()) {
  emulator::worker->warp_barrier(at);
}

// ---- between lanes

namespace emulator {

template <class T>
struct Exchange {
  T value;
  int partner;
  T result;
};

template <class T>
T exchange(const char* word, T value, int partner, const Location& at) {
  static_assert(sizeof(T) == 4);
  Exchange<T> lane{value, partner, {}};
  worker->collective(word, lane, at, [](Exchange<T>* const* lanes) {
    ++worker->counters.shuffles;
    for (int i = 0; i < 32; ++i) lanes[i]->result = lanes[lanes[i]->partner & 31]->value;
  });
  return lane.result;
}

}  // namespace emulator

template <class T>
T shuffle_xor(T value, int mask, const emulator::Location& at = emulator::Location::current()) {
  return emulator::exchange("shuffle_xor", value, lane_index() ^ mask, at);
}
template <class T>
T shuffle(T value, int lane, const emulator::Location& at = emulator::Location::current()) {
  return emulator::exchange("shuffle", value, lane, at);
}
inline bool any_lane(bool value, const emulator::Location& at = emulator::Location::current()) {
  emulator::worker->collective("any_lane", value, at, [](bool* const* lanes) {
    ++emulator::worker->counters.shuffles;
    bool any = false;
    for (int i = 0; i < 32; ++i) any |= *lanes[i];
    for (int i = 0; i < 32; ++i) *lanes[i] = any;
  });
  return value;
}

// ---- global memory

namespace emulator {

template <class T>
inline constexpr bool kAccessible = sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16;

}  // namespace emulator

template <class T>
T load_global(const T* from, const emulator::Location& at = emulator::Location::current()) {
  static_assert(emulator::kAccessible<T>);
  emulator::worker->check_global_read(from, sizeof(T), /*constant=*/true, "load_global", at);
  T value;
  std::memcpy(&value, emulator::host_pointer(from), sizeof(T));
  return value;
}
template <class T>
T load_global_once(const T* from, const emulator::Location& at = emulator::Location::current()) {
  static_assert(emulator::kAccessible<T>);
  emulator::worker->check_global_read(from, sizeof(T), /*constant=*/false, "load_global_once", at);
  T value;
  std::memcpy(&value, emulator::host_pointer(from), sizeof(T));
  return value;
}
template <class T>
void store_global(T* to, T value, const emulator::Location& at = emulator::Location::current()) {
  static_assert(emulator::kAccessible<T>);
  emulator::worker->check_global_write(to, sizeof(T), at);
  std::memcpy(emulator::host_pointer(to), &value, sizeof(T));
}

// ---- shared memory

inline uint32_t shared_base() { return emulator::kSharedBase; }

template <class T>
T load_shared(uint32_t from, const emulator::Location& at = emulator::Location::current()) {
  static_assert(emulator::kAccessible<T>);
  emulator::worker->check_shared(from, sizeof(T), /*write=*/false, emulator::worker->thread, at);
  emulator::worker->note(emulator::Access::shared_read, from, sizeof(T), at);
  T value;
  std::memcpy(&value, emulator::worker->shared_at(from), sizeof(T));
  return value;
}
template <class T>
void store_shared(uint32_t to, T value, const emulator::Location& at = emulator::Location::current()) {
  static_assert(emulator::kAccessible<T>);
  emulator::worker->check_shared(to, sizeof(T), /*write=*/true, emulator::worker->thread, at);
  emulator::worker->note(emulator::Access::shared_write, to, sizeof(T), at);
  std::memcpy(emulator::worker->shared_at(to), &value, sizeof(T));
}

// ---- asynchronous copies

inline void copy_async(uint32_t to, const void* from, bool valid,
                       const emulator::Location& at = emulator::Location::current()) {
  emulator::worker->copy_async(to, from, valid, at);
}
inline void copy_async_commit() { emulator::worker->copy_async_commit(); }
template <int Pending>
void copy_async_wait(const emulator::Location& at = emulator::Location::current()) {
  emulator::worker->copy_async_wait(Pending, at);
}

// ---- tensor cores

inline void load_matrices(uint32_t (&r)[4], uint32_t address,
                          const emulator::Location& at = emulator::Location::current()) {
  emulator::worker->load_matrices(r, address, /*transposed=*/false, at);
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address,
                                     const emulator::Location& at = emulator::Location::current()) {
  emulator::worker->load_matrices(r, address, /*transposed=*/true, at);
}
template <Element E>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  const emulator::Location& at = emulator::Location::current()) {
  static_assert(E == Element::bfloat16 || E == Element::float16);
  const uint32_t b[2] = {b0, b1};
  emulator::worker->product_of_registers("multiply_add", E, 1, d, a, b, at);
}

template <int Columns>
struct Tile;

namespace emulator {

// The bodies of tile.cuh's functions of the same names as one step of the warp, with their addresses.
template <int Columns>
struct TileLane {
  void* d;
  const void* a;
  Tile<Columns> tile;
  int row, column;
};

// addresses[i][lane] = address(lane's tile, row and column, lane, i)
template <int Count, class Lane, class Address>
void tile_addresses(Lane* const* lanes, uint32_t (&addresses)[Count][32], Address address) {
  Lane all[32];
  for (int t = 0; t < 32; ++t) all[t] = *lanes[t];
  for (int i = 0; i < Count; ++i) {
    for (int t = 0; t < 32; ++t) addresses[i][t] = address(all[t], t, i);
  }
}

// Count matrix loads into r[0] .. r[Count - 1].
template <bool Transposed, int Count, int Columns, class Address>
void load_operands(const char* word, uint32_t (*r)[4], Tile<Columns> tile, int row, int column, const Location& at,
                   Address address) {
  using Lane = TileLane<Columns>;
  Lane lane{r, nullptr, tile, row, column};
  worker->collective(word, lane, at, [&](Lane* const* lanes) {
    uint32_t addresses[Count][32];
    tile_addresses(lanes, addresses, address);
    for (int i = 0; i < Count; ++i) {
      uint32_t* registers[32];
      for (int t = 0; t < 32; ++t) registers[t] = static_cast<uint32_t*>(lanes[t]->d) + 4 * i;
      worker->spread_matrices(addresses[i], registers, Transposed, at);
    }
  });
}

template <int MT, int KT, int Columns>
void load_left(uint32_t (&a)[MT][KT][4], Tile<Columns> tile, int row, int column,
               const Location& at = Location::current()) {
  load_operands<false, MT * KT>("load_left", a[0], tile, row, column, at,
                                [](const TileLane<Columns>& one, int t, int i) {
                                  const int m = i / KT, k = i % KT;
                                  return left_address(one.tile, one.row + 16 * m, one.column + 16 * k, t);
                                });
}

template <int MT, int KT, int Columns>
void load_left_transposed(uint32_t (&a)[MT][KT][4], Tile<Columns> tile, int row, int column,
                          const Location& at = Location::current()) {
  load_operands<true, MT * KT>("load_left_transposed", a[0], tile, row, column, at,
                               [](const TileLane<Columns>& one, int t, int i) {
                                 const int m = i / KT, k = i % KT;
                                 return left_address_transposed(one.tile, one.row + 16 * k, one.column + 16 * m, t);
                               });
}

template <int NT, int Columns>
void load_right_rows(uint32_t (&b)[NT / 2][4], Tile<Columns> tile, int row, int column,
                     const Location& at = Location::current()) {
  load_operands<false, NT / 2>("load_right_rows", b, tile, row, column, at,
                               [](const TileLane<Columns>& one, int t, int i) {
                                 return right_address_rows(one.tile, one.row + 16 * i, one.column, t);
                               });
}

template <int NT, int Columns>
void load_right_columns(uint32_t (&b)[NT / 2][4], Tile<Columns> tile, int row, int column,
                        const Location& at = Location::current()) {
  load_operands<true, NT / 2>("load_right_columns", b, tile, row, column, at,
                              [](const TileLane<Columns>& one, int t, int i) {
                                return right_address_columns(one.tile, one.row, one.column + 16 * i, t);
                              });
}

template <Element E, int NT>
void product_of_operands(float (&d)[NT][4], const uint32_t (&a)[4], const uint32_t (&b)[NT / 2][4],
                         const Location& at = Location::current()) {
  worker->product_of_registers("product_of_operands", E, NT, d[0], a, b[0], at);
}

template <Element E, bool Transposed, int MT, int NT, int KT, int Columns, class Address>
void product(const char* word, float (&d)[MT][NT][4], const uint32_t (&a)[MT][KT][4], Tile<Columns> tile, int row,
             int column, const Location& at, Address address) {
  using Lane = TileLane<Columns>;
  Lane lane{d, a, tile, row, column};
  worker->collective(word, lane, at, [&](Lane* const* lanes) {
    uint32_t addresses[KT * NT / 2][32];
    tile_addresses(lanes, addresses,
                   [&](const Lane& one, int t, int i) { return address(one, t, i / (NT / 2), 2 * (i % (NT / 2))); });
    float* all_d[32];
    const uint32_t* all_a[32];
    for (int t = 0; t < 32; ++t) {
      all_d[t] = static_cast<float*>(lanes[t]->d), all_a[t] = static_cast<const uint32_t*>(lanes[t]->a);
    }
    worker->product(E, Transposed, MT, NT, KT, all_d, all_a, addresses, at);
  });
}

template <Element E, int MT, int NT, int KT, int Columns>
void product_with_rows(float (&d)[MT][NT][4], const uint32_t (&a)[MT][KT][4], Tile<Columns> tile, int row, int column,
                       const Location& at = Location::current()) {
  product<E, false>("product_with_rows", d, a, tile, row, column, at,
                    [](const TileLane<Columns>& one, int t, int k, int n) {
                      return right_address_rows(one.tile, one.row + 8 * n, one.column + 16 * k, t);
                    });
}

template <Element E, int MT, int NT, int KT, int Columns>
void product_with_columns(float (&d)[MT][NT][4], const uint32_t (&a)[MT][KT][4], Tile<Columns> tile, int row,
                          int column, const Location& at = Location::current()) {
  product<E, true>("product_with_columns", d, a, tile, row, column, at,
                   [](const TileLane<Columns>& one, int t, int k, int n) {
                     return right_address_columns(one.tile, one.row + 16 * k, one.column + 8 * n, t);
                   });
}

}  // namespace emulator

// ---- numbers

inline float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t float_to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

namespace emulator {

// Subnormal numbers are zero, as the special function unit has it.
inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.f, x) : x; }

inline uint16_t round_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float widen_float16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return bits_to_float(sign | float_to_bits(float(fraction) * 0x1p-24f));
  return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
}

inline uint16_t round_to_float16(float value) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return 0x7fff;
  if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // 65520 and above
  if (rest < 0x38800000u) {                                 // subnormal: the addition rounds to multiples of 2^-24
    return uint16_t(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1)) >> 13));
}

}  // namespace emulator

inline float exp2_approx(float x) {
  ++emulator::worker->counters.exp2;
  return emulator::flush(exp2f(x));
}
inline float log2_approx(float x) {
  ++emulator::worker->counters.log2;
  return log2f(emulator::flush(x));
}
inline float reciprocal(float x) {
  const float y = emulator::flush(1.f / emulator::flush(x));
  return fmaf(y, fmaf(-x, y, 1.f), y);
}
inline float inverse_root(float x) {
  const float y = 1.f / sqrtf(emulator::flush(x));
  return fmaf(0.5f * y, fmaf(-x * y, y, 1.f), y);
}

template <Element E>
uint32_t pack(float low, float high) {
  static_assert(E == Element::bfloat16 || E == Element::float16);
  if constexpr (E == Element::bfloat16) {
    return emulator::round_to_bfloat16(low) | uint32_t(emulator::round_to_bfloat16(high)) << 16;
  } else {
    return emulator::round_to_float16(low) | uint32_t(emulator::round_to_float16(high)) << 16;
  }
}

template <Element E>
float2 unpack(uint32_t both) {
  static_assert(E == Element::bfloat16 || E == Element::float16);
  if constexpr (E == Element::bfloat16) {
    return {bits_to_float(both << 16), bits_to_float(both & 0xffff0000u)};
  } else {
    return {emulator::widen_float16(uint16_t(both)), emulator::widen_float16(uint16_t(both >> 16))};
  }
}

template <Element E>
struct Storage {
  using Type = uint16_t;
};
template <>
struct Storage<Element::float32> {
  using Type = float;
};

template <Element E>
float widen(typename Storage<E>::Type bits) {
  if constexpr (E == Element::float32) {
    return bits;
  } else if constexpr (E == Element::bfloat16) {
    return bits_to_float(uint32_t(bits) << 16);
  } else {
    return emulator::widen_float16(bits);
  }
}
template <Element E>
typename Storage<E>::Type narrow(float value) {
  if constexpr (E == Element::float32) {
    return value;
  } else if constexpr (E == Element::bfloat16) {
    return emulator::round_to_bfloat16(value);
  } else {
    return emulator::round_to_float16(value);
  }
}

}  // namespace dinov3_ext
