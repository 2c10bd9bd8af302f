// The device vocabulary: everything a kernel does beyond plain C++ arithmetic, and the only inline PTX of this package.
//
// Kernels are written in these words alone (no threadIdx, no __shared__, no raw pointer into shared memory), so that
// the same source is compiled by nvcc for a GPU and by the host compiler for the emulator (csrc/emulator), which runs
// one fiber per CUDA thread and checks every access. `DINOV3_EXT_EMULATOR` chooses the second half of each word.
//
//   who am I        thread_index, lane_index, warp_index, block_index<0|1|2>, grid_size<0|1|2>
//   order           block_barrier, warp_barrier
//   between lanes   shuffle_xor, shuffle, any_lane
//   global memory   load_global, load_global_once, store_global      T of 2, 4, 8 or 16 bytes, naturally aligned
//   shared memory   shared_base, load_shared, store_shared           32-bit byte addresses; T as above
//   asynchronous    copy_async, copy_async_commit, copy_async_wait   16 bytes global -> shared, zeros where not valid
//   tensor cores    load_matrices, load_matrices_transposed, multiply_add
//   numbers         exp2_approx, log2_approx, reciprocal, inverse_root, pack, unpack, widen, narrow, bits_to_float,
//                   float_to_bits; and of <cmath>: fmaf, fmaxf, fminf, logf, sqrtf, INFINITY
//
// Of these only block_barrier and warp_barrier order memory between threads; shuffles and matrix loads do not.
#pragma once

#include <cstdint>

#include "core/element.h"

#if defined(DINOV3_EXT_EMULATOR)
#include "emulator/primitives.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace dinov3_ext {

// ---- who am I
// ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int thread_index() { return int(threadIdx.x); }
__device__ __forceinline__ int lane_index() { return int(threadIdx.x) & 31; }
__device__ __forceinline__ int warp_index() { return int(threadIdx.x) >> 5; }

template <int Axis>
__device__ __forceinline__ int64_t block_index() {
  return Axis == 0 ? blockIdx.x : Axis == 1 ? blockIdx.y : blockIdx.z;
}
template <int Axis>
__device__ __forceinline__ int64_t grid_size() {
  return Axis == 0 ? gridDim.x : Axis == 1 ? gridDim.y : gridDim.z;
}

// ---- order
// ------------------------------------------------------------------------------------------------------------

// All threads of the block arrive (those that returned count as arrived); memory before it is seen after it.
__device__ __forceinline__ void block_barrier() { __syncthreads(); }
// All 32 lanes of the warp arrive; memory before it is seen after it by these lanes.
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// ---- between lanes
// ----------------------------------------------------------------------------------------------------

template <class T>  // float or a 32-bit integer; the value of lane (lane_index() ^ mask)
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>  // the value of lane `lane`
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
__device__ __forceinline__ bool any_lane(bool value) { return __any_sync(0xffffffffu, value); }

// ---- global memory
// ----------------------------------------------------------------------------------------------------

// Read-only for the life of the kernel: nobody writes it while the kernel runs.
template <class T>
__device__ __forceinline__ T load_global(const T* from) {
  return __ldg(from);
}
// The same for data that this kernel reads once: it does not displace what the caches hold.
template <class T>
__device__ __forceinline__ T load_global_once(const T* from) {
  return __ldcs(from);
}
template <class T>
__device__ __forceinline__ void store_global(T* to, T value) {
  *to = value;
}

// ---- shared memory: byte addresses within the block's dynamic shared memory
// ----------------------------------------------

// Address of the first byte; a multiple of 128.
__device__ __forceinline__ uint32_t shared_base() {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  return uint32_t(__cvta_generic_to_shared(dynamic_shared));
}

template <class T>
__device__ __forceinline__ T load_shared(uint32_t from) {
  T value;
  if constexpr (sizeof(T) == 16) {
    uint4& v = reinterpret_cast<uint4&>(value);
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    uint2& v = reinterpret_cast<uint2&>(value);
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    uint32_t& v = reinterpret_cast<uint32_t&>(value);
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
  } else {
    static_assert(sizeof(T) == 2);
    uint16_t& v = reinterpret_cast<uint16_t&>(value);
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(from) : "memory");
  }
  return value;
}

template <class T>
__device__ __forceinline__ void store_shared(uint32_t to, T value) {
  if constexpr (sizeof(T) == 16) {
    const uint4& v = reinterpret_cast<const uint4&>(value);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    const uint2& v = reinterpret_cast<const uint2&>(value);
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(v.x), "r"(v.y) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(reinterpret_cast<const uint32_t&>(value)) : "memory");
  } else {
    static_assert(sizeof(T) == 2);
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(reinterpret_cast<const uint16_t&>(value)) : "memory");
  }
}

// ---- asynchronous copies
// ------------------------------------------------------------------------------------------------

// Starts copying 16 bytes (both addresses multiples of 16), past the L1 cache; writes zeros, and does not read `from`,
// where not `valid`. The bytes may be read by this thread after copy_async_wait, by others after a barrier behind it.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Ends this thread's group of copies.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Pending` of this thread's groups are under way.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- tensor cores
// ------------------------------------------------------------------------------------------------------- Fragments of
// mma.m16n8k16, with r = lane / 4 and c = 2 (lane % 4); two 16-bit elements in a register, the lower first:
//   a[q]: row r + 8 (q & 1), columns c + 8 (q >> 1) + {0, 1}      b[q]: k rows c + 8 q + {0, 1}, column r
//   d[q]: row r + 8 (q >> 1), column c + (q & 1), fp32

// Four 8 x 8 matrices of 16-bit elements: lanes 8 j to 8 j + 7 give the 16-byte row addresses of matrix j; lane t
// receives elements (t / 4, 2 (t % 4) + {0, 1}) of matrix j in r[j].
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// The same, each matrix transposed: lane t receives elements (2 (t % 4) + {0, 1}, t / 4).
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d += a b for one 16 x 8 tile over 16 products; E: bfloat16 or float16, sums fp32.
template <Element E>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(E == Element::bfloat16 || E == Element::float16);
  if constexpr (E == Element::bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// ---- numbers
// ------------------------------------------------------------------------------------------------------------

// 2^x by the special function unit, relative error 2^-22; subnormal results are zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2 x by the special function unit, absolute error 2^-22 within [0.5, 2], relative 2^-22 outside.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x within one unit in the last place, no branches: the unit's estimate and one Newton step. x normal, 1/x normal.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(y, fmaf(-x, y, 1.f), y);
}
// 1 / sqrt(x) within two units in the last place; x normal and positive.
__device__ __forceinline__ float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(0.5f * y, fmaf(-x * y, y, 1.f), y);
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float value) { return __float_as_uint(value); }

// Two floats rounded to nearest even, `low` in the lower half.
template <Element E>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  static_assert(E == Element::bfloat16 || E == Element::float16);
  if constexpr (E == Element::bfloat16) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  }
}

template <Element E>
__device__ __forceinline__ float2 unpack(uint32_t both) {
  static_assert(E == Element::bfloat16 || E == Element::float16);
  if constexpr (E == Element::bfloat16) {
    return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(both));
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
__device__ __forceinline__ float widen(typename Storage<E>::Type bits) {
  if constexpr (E == Element::float32) {
    return bits;
  } else if constexpr (E == Element::bfloat16) {
    return __uint_as_float(uint32_t(bits) << 16);
  } else {
    return __half2float(reinterpret_cast<const __half&>(bits));
  }
}
template <Element E>
__device__ __forceinline__ typename Storage<E>::Type narrow(float value) {
  if constexpr (E == Element::float32) {
    return value;
  } else if constexpr (E == Element::bfloat16) {
    const __nv_bfloat16 rounded = __float2bfloat16_rn(value);
    return reinterpret_cast<const uint16_t&>(rounded);
  } else {
    const __half rounded = __float2half_rn(value);
    return reinterpret_cast<const uint16_t&>(rounded);
  }
}

}  // namespace dinov3_ext

#endif
