// Which instruction set the CPU kernels use: chosen at run time, once, and changeable by tests.
//
// The members are ordered: a CPU that runs one runs all before it, so `variant >= CpuVariant::avx512` asks for AVX-512
// or better. avx512_bf16 adds products of bf16 pairs (vdpbf16ps), amx adds products of bf16 tiles.
#pragma once

#include <atomic>

#include "core/element.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dinov3_ext {

enum class CpuVariant : int { portable, avx2, avx512, avx512_bf16, amx };

// Tiles need the kernel's permission, for which a process asks once (the request is repeatable).
inline bool amx_permitted() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (d & kBf16) && (d & kTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

inline CpuVariant best_cpu_variant() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    if (!__builtin_cpu_supports("avx512bf16")) return CpuVariant::avx512;
    return amx_permitted() ? CpuVariant::amx : CpuVariant::avx512_bf16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuVariant::avx2;
#endif
  return CpuVariant::portable;
}

inline std::atomic<CpuVariant>& cpu_variant() {
  static std::atomic<CpuVariant> chosen{best_cpu_variant()};
  return chosen;
}

// One of three, for the instruction set in use. T: kernels of one op, an instruction set each.
template <class T>
const T& choose_by_variant(const T& portable, const T& avx2, const T& avx512) {
  if (cpu_variant() >= CpuVariant::avx512) return avx512;
  return cpu_variant() >= CpuVariant::avx2 ? avx2 : portable;
}

// choose<element>().
template <class Choose>
decltype(auto) with_element(Element element, Choose choose) {
  switch (element) {
    case Element::float32: return choose.template operator()<Element::float32>();
    case Element::bfloat16: return choose.template operator()<Element::bfloat16>();
    case Element::float16: break;
  }
  return choose.template operator()<Element::float16>();
}

}  // namespace dinov3_ext

#if defined(__x86_64__)
#define DINOV3_EXT_AVX2 __attribute__((target("avx2,fma")))
#define DINOV3_EXT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define DINOV3_EXT_AVX512_BF16 __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define DINOV3_EXT_AMX \
  __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#endif
