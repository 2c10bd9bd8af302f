// Which instruction set the CPU kernels use: chosen at run time, once, and changeable by tests.
#pragma once

#include <atomic>

namespace dinov3_ext {

enum class CpuVariant : int { portable, avx2, avx512 };

inline CpuVariant best_cpu_variant() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return CpuVariant::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuVariant::avx2;
#endif
  return CpuVariant::portable;
}

inline std::atomic<CpuVariant>& cpu_variant() {
  static std::atomic<CpuVariant> chosen{best_cpu_variant()};
  return chosen;
}

}  // namespace dinov3_ext

#if defined(__x86_64__)
#define DINOV3_EXT_AVX2 __attribute__((target("avx2,fma")))
#define DINOV3_EXT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#endif
