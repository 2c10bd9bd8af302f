// Threads for the CPU kernels, handed in by the caller: they know neither torch nor a thread pool of their own.
#pragma once

#include <cstdint>

namespace dinov3_ext {

// parallel_for(begin, end, body, context) calls body(b, e, context) over parts of [begin, end) on the caller's threads.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, ParallelBody body, void* context);

}  // namespace dinov3_ext
