// Small kernels that test the emulator itself: torch.ops.dinov3_ext_probes, compiled into the emulator's library.
// Correct kernels whose barriers the mutants remove, kernels with one mistake each, and words one at a time.
#include <torch/csrc/stable/library.h>

#include "binding/device.h"
#include "core/block_reduce.cuh"
#include "core/launch.cuh"
#include "core/tile.cuh"
#include "ops/gram_loss/gram_loss_cuda.cuh"

namespace dinov3_ext {
namespace {

void check(int status) { STD_TORCH_CHECK(status == 0, cuda_status_text(status)); }

// ---- any schedule of accesses to shared memory
// ------------------------------------------------------------------------------------------------

enum Step : int { kNothing, kRead, kWrite, kWarpBarrier, kBlockBarrier };

// program: (steps, threads, 3): step, byte address, bytes.
__global__ void interpret_kernel(const int32_t* program, float* result, int steps, int threads) {
  uint32_t sum = 0;
  for (int i = 0; i < steps; ++i) {
    const int32_t* step = program + (int64_t(i) * threads + thread_index()) * 3;
    const uint32_t address = shared_base() + uint32_t(load_global(step + 1));
    const int bytes = load_global(step + 2);
    switch (load_global(step)) {
      case kRead:
        if (bytes == 2) sum += load_shared<uint16_t>(address);
        if (bytes == 4) sum += load_shared<uint32_t>(address);
        if (bytes == 8) sum += load_shared<uint2>(address).x;
        if (bytes == 16) sum += load_shared<uint4>(address).x;
        break;
      case kWrite:
        if (bytes == 2) store_shared(address, uint16_t(i));
        if (bytes == 4) store_shared(address, uint32_t(i));
        if (bytes == 8) store_shared(address, uint2{uint32_t(i), 0});
        if (bytes == 16) store_shared(address, uint4{uint32_t(i), 0, 0, 0});
        break;
      case kWarpBarrier: warp_barrier(); break;
      case kBlockBarrier: block_barrier(); break;
      default: break;
    }
  }
  store_global(result + thread_index(), float(sum));
}

Tensor interpret(const Tensor& program) {
  const int64_t threads = program.size(1);
  Tensor result = empty(program, {threads}, ScalarType::Float);
  check(launch<interpret_kernel>(Shape{.threads = int(threads), .shared_bytes = 256}, nullptr, input<int32_t>(program),
                                 output<float>(result), int(program.size(0)), int(threads)));
  return result;
}

// ---- correct kernels with every kind of barrier and wait
// --------------------------------------------------------------------------------------

// Sums of rows of 64 floats, by four rotations of the row around the block and one within each warp.
__global__ void rotate_kernel(const float* from, float* to) {
  const uint32_t base = shared_base();
  const int thread = thread_index();
  float value = load_global(from + block_index<0>() * 64 + thread), sum = value;
  for (int i = 0; i < 4; ++i) {
    store_shared(base + 4u * uint32_t(thread), value);
    block_barrier();
    value = load_shared<float>(base + 4u * uint32_t((thread + 32) % 64));
    block_barrier();
    sum += value;
    const uint32_t warp = base + 128u * uint32_t(warp_index());
    store_shared(warp + 4u * uint32_t(lane_index()), value);
    warp_barrier();
    value = load_shared<float>(warp + 4u * uint32_t((lane_index() + 1) % 32));
    warp_barrier();
    sum += value;
  }
  store_global(to + block_index<0>() * 64 + thread, sum);
}

Tensor rotate(const Tensor& from) {
  Tensor to = empty(from, {from.size(0), 64}, ScalarType::Float);
  check(launch<rotate_kernel>(Shape{.x = from.size(0), .threads = 64, .shared_bytes = 256}, nullptr, input<float>(from),
                              output<float>(to)));
  return to;
}

// Column sums of (64 steps, 128) floats through a ring of three buffers, two groups under way: 32 threads copy 16 bytes
// each, and each reads what its neighbour copied.
__global__ void pipeline_kernel(const float* from, float* to, int steps) {
  const uint32_t base = shared_base();
  const int thread = thread_index(), neighbour = (thread + 1) % 64;
  auto copy = [&](int step) {
    const uint32_t buffer = base + 1024u * uint32_t(step % 3);
    copy_async(buffer + 16u * uint32_t(thread), from + (step < steps ? step * 256 + thread * 4 : 0), step < steps);
    copy_async_commit();
  };
  copy(0);
  copy(1);
  float4 sum{};
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<1>();
    block_barrier();  // everybody's copies of this step are here, and the buffer of the last step is free
    copy(step + 2);
    const float4 value = load_shared<float4>(base + 1024u * uint32_t(step % 3) + 16u * uint32_t(neighbour));
    sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
  }
  store_global(reinterpret_cast<float4*>(to) + neighbour, sum);
}

Tensor pipeline(const Tensor& from) {
  Tensor to = empty(from, {256}, ScalarType::Float);
  check(launch<pipeline_kernel>(Shape{.threads = 64, .shared_bytes = 3 * 1024}, nullptr, input<float>(from),
                                output<float>(to), int(from.size(0))));
  return to;
}

// Sum of each row by block_reduce, twice over, so that the second call meets the scratch of the first.
__global__ void reduce_kernel(const float* from, float* to, int64_t columns) {
  float sum = 0.f, largest = -INFINITY;
  for (int64_t k = thread_index(); k < columns; k += 128) {
    const float value = load_global(from + block_index<0>() * columns + k);
    sum += value, largest = fmaxf(largest, value);
  }
  sum = block_reduce<Add, 128>(sum, shared_base());
  largest = block_reduce<Larger, 128>(largest, shared_base());
  if (thread_index() < 2) store_global(to + block_index<0>() * 2 + thread_index(), thread_index() ? largest : sum);
}

Tensor reduce(const Tensor& from) {
  Tensor to = empty(from, {from.size(0), 2}, ScalarType::Float);
  check(launch<reduce_kernel>(Shape{.x = from.size(0), .threads = 128, .shared_bytes = 16}, nullptr, input<float>(from),
                              output<float>(to), from.size(1)));
  return to;
}

// ---- one mistake each
// ---------------------------------------------------------------------------------------------------------

struct FaultyArgs {
  const float* read_only;  // 128 floats
  float* writable;         // 128 floats
  int mistake;
};

float deep(int depth) {
  volatile float large[1024];
  for (volatile float& value : large) value = float(depth);
  return depth < 1 << 20 ? deep(depth + 1) + large[depth % 1024] : large[0];
}

// Two blocks of 64 threads, 256 bytes of shared memory.
__global__ void faulty_kernel(FaultyArgs args) {
  const int thread = thread_index(), lane = lane_index();
  const int64_t block = block_index<0>();
  const uint32_t base = shared_base(), own = base + 4u * uint32_t(thread);
  store_shared(own, 1.f);
  float value = 0.f;
  switch (args.mistake) {
    case 0: break;
    case 1: value = load_shared<float>(own + 4u); break;  // out of bounds by the last thread, a race
    case 2: value = load_shared<float>(base + 256u + 4u * uint32_t(thread)); break;  // out of bounds
    case 3: value = load_shared<float>(own - base); break;                           // the base forgotten
    case 4: value = load_shared<float2>(own & ~7u | 4u).x; break;                    // misaligned
    case 5: value = load_global(args.read_only + 128 + thread); break;               // out of bounds
    case 6: value = load_global(args.read_only - 1); break;
    case 7: store_global(const_cast<float*>(args.read_only) + thread, 1.f); break;
    case 8: value = load_global(reinterpret_cast<const float4*>(args.read_only + 1)).x; break;  // misaligned
    case 9:                                                                                     // half a warp shuffles
      if (lane < 16) value = shuffle_xor(value, 1);
      break;
    case 10: value = lane < 16 ? shuffle_xor(value, 1) : shuffle(value, 1); break;
    case 11:
      if (thread != 5)
        block_barrier();
      else
        warp_barrier();
      break;
    case 12:
      if (thread < 32)
        block_barrier();
      else
        block_barrier();
      break;
    case 13: store_global(args.writable + thread, 1.f); break;                   // both blocks write it
    case 14: store_global(args.writable + block * 64 + thread / 2, 1.f); break;  // two threads write it
    case 15:  // one block reads what the other writes
      if (block == 0)
        store_global(args.writable + thread, 1.f);
      else
        value = load_global_once(args.writable + thread);
      break;
    case 16:  // load_global of what the launch writes
      store_global(args.writable + block * 64 + thread, 1.f);
      value = load_global(args.writable + block * 64 + thread);
      break;
    case 17:  // allowed: in place by the same thread
      value = load_global_once(args.writable + block * 64 + thread);
      store_global(args.writable + block * 64 + thread, 1.f);
      break;
    case 18:  // allowed: a barrier between them
      store_global(args.writable + block * 64 + thread, 1.f);
      block_barrier();
      value = load_global_once(args.writable + block * 64 + (thread ^ 1));
      break;
    case 19: copy_async(base + 16u * uint32_t(lane), args.read_only + 4 * lane + 1, true); break;  // misaligned
    case 20: copy_async(base + 16u * uint32_t(thread & 15), nullptr, false); break;  // unordered copies to one place
    case 21:  // allowed: nothing is read where not valid
      block_barrier();
      if (thread < 16) copy_async(base + 16u * uint32_t(thread), nullptr, false);
      copy_async_commit();
      copy_async_wait<0>();
      break;
    case 22:  // allowed: returned threads count as arrived
      if (thread >= 32) return;
      block_barrier();
      break;
    case 23:  // a lane of the warp has returned
      if (lane == 31) return;
      value = shuffle_xor(value, 1);
      break;
    case 24: value = load_shared<float>(base + 4u * uint32_t(thread ^ 32)); break;  // another warp's, no barrier
    case 25:                                                                        // a shuffle is no barrier
      value = shuffle_xor(value, 1);
      value = load_shared<float>(base + 4u * uint32_t(thread ^ 1));
      break;
    case 26:  // a warp barrier orders its own warp alone
      warp_barrier();
      value = load_shared<float>(base + 4u * uint32_t(thread ^ 32));
      break;
    case 27:  // allowed
      warp_barrier();
      value = load_shared<float>(base + 4u * uint32_t(thread ^ 1));
      break;
    case 28:  // read by two warps, then written by one
      block_barrier();
      value = load_shared<float>(base);
      warp_barrier();
      if (thread == 0) store_shared(base, 2.f);
      break;
    case 29: {  // matrix load across threads' stores
      uint32_t r[4];
      load_matrices(r, base + 16u * uint32_t(lane & 15));
      value = bits_to_float(r[0]);
      break;
    }
    case 30: value = args.read_only[thread]; break;  // a plain pointer to global memory
    case 31: args.writable[block * 64 + thread] = 1.f; break;
    case 32: {  // an address that nobody has; not null, which UndefinedBehaviorSanitizer ends before the emulator does
      volatile uintptr_t nowhere = 16;
      value = *reinterpret_cast<volatile const float*>(nowhere);
      break;
    }
    case 33: value = deep(thread); break;  // a stack overflow
    default: break;
  }
  if (args.mistake == 0) store_global(args.writable + block * 64 + thread, load_shared<float>(own) + value);
  if (value == 12345.f) store_global(args.writable, value);  // so that no compiler drops the reads
}

void faulty(const Tensor& read_only, Tensor writable, int64_t mistake) {
  check(launch<faulty_kernel>(Shape{.x = 2, .threads = 64, .shared_bytes = 256}, nullptr,
                              FaultyArgs{input<float>(read_only), output<float>(writable), int(mistake)}));
}

// Shared memory that nobody wrote.
__global__ void unwritten_kernel(float* result) {
  if (thread_index() < 16) store_shared(shared_base() + 4u * uint32_t(thread_index()), 0.f);
  block_barrier();
  store_global(result + thread_index(), load_shared<float>(shared_base() + 4u * uint32_t(thread_index())));
}

Tensor unwritten(const Tensor& like) {
  Tensor result = empty(like, {64}, ScalarType::Float);
  check(launch<unwritten_kernel>(Shape{.threads = 32, .shared_bytes = 128}, nullptr, output<float>(result)));
  return result;
}

void shape(const Tensor& like, int64_t x, int64_t y, int64_t threads, int64_t shared_bytes) {
  Tensor result = empty(like, {64}, ScalarType::Float);
  check(launch<unwritten_kernel>(Shape{x, y, 1, int(threads), int(shared_bytes)}, nullptr, output<float>(result)));
}

// ---- one word at a time
// -------------------------------------------------------------------------------------------------------

// Registers of one warp: a (32, 4), b (32, 2), d (32, 4).
template <Element E>
__global__ void fragments_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = lane_index();
  uint32_t left[4];
  float sums[4];
  for (int q = 0; q < 4; ++q) left[q] = load_global(a + lane * 4 + q), sums[q] = float(100 * q);
  multiply_add<E>(sums, left, load_global(b + lane * 2), load_global(b + lane * 2 + 1));
  for (int q = 0; q < 4; ++q) store_global(d + lane * 4 + q, sums[q]);
}

Tensor fragments(const Tensor& a, const Tensor& b, bool float16) {
  Tensor d = empty(a, {32, 4}, ScalarType::Float);
  const auto *left = input<uint32_t>(a), *right = input<uint32_t>(b);
  auto* sums = output<float>(d);
  check(float16 ? launch<fragments_kernel<Element::float16>>(Shape{}, nullptr, left, right, sums)
                : launch<fragments_kernel<Element::bfloat16>>(Shape{}, nullptr, left, right, sums));
  return d;
}

// memory: 512 bytes; addresses (32); the registers of load_matrices, then of load_matrices_transposed: (2, 32, 4).
__global__ void matrices_kernel(const uint4* memory, const int32_t* addresses, uint32_t* registers) {
  const int lane = lane_index();
  store_shared(shared_base() + 16u * uint32_t(lane), load_global(memory + lane));
  warp_barrier();
  uint32_t r[4];
  const uint32_t address = shared_base() + uint32_t(load_global(addresses + lane));
  load_matrices(r, address);
  for (int j = 0; j < 4; ++j) store_global(registers + lane * 4 + j, r[j]);
  load_matrices_transposed(r, address);
  for (int j = 0; j < 4; ++j) store_global(registers + 128 + lane * 4 + j, r[j]);
}

Tensor matrices(const Tensor& memory, const Tensor& addresses) {
  Tensor registers = empty(addresses, {2, 32, 4}, ScalarType::Int);
  check(launch<matrices_kernel>(Shape{.shared_bytes = 512}, nullptr, input<uint4>(memory), input<int32_t>(addresses),
                                output<uint32_t>(registers)));
  return registers;
}

// Word `which` of every element: see tests/emulator/test_emulator_words.py.
__global__ void numbers_kernel(const float* from, float* to, int64_t size, int which) {
  const int64_t i = block_index<0>() * 32 + thread_index();
  if (i >= size) return;
  const float x = load_global(from + i);
  float y = 0.f;
  switch (which) {
    case 0: y = unpack<Element::bfloat16>(pack<Element::bfloat16>(x, 0.f)).x; break;
    case 1: y = unpack<Element::bfloat16>(pack<Element::bfloat16>(0.f, x)).y; break;
    case 2: y = unpack<Element::float16>(pack<Element::float16>(x, 0.f)).x; break;
    case 3: y = unpack<Element::float16>(pack<Element::float16>(0.f, x)).y; break;
    case 4: y = widen<Element::bfloat16>(narrow<Element::bfloat16>(x)); break;
    case 5: y = widen<Element::float16>(narrow<Element::float16>(x)); break;
    case 6: y = exp2_approx(x); break;
    case 7: y = log2_approx(x); break;
    case 8: y = reciprocal(x); break;
    case 9: y = inverse_root(x); break;
    default: break;
  }
  store_global(to + i, y);
}

Tensor numbers(const Tensor& from, int64_t which) {
  Tensor to = empty(from, {from.numel()}, ScalarType::Float);
  check(launch<numbers_kernel>(Shape{.x = (from.numel() + 31) / 32}, nullptr, input<float>(from), output<float>(to),
                               from.numel(), int(which)));
  return to;
}

// Lane i stores and loads `bytes` bytes at i * stride.
__global__ void strided_kernel(int stride, int bytes, float* result) {
  const uint32_t address = shared_base() + uint32_t(lane_index() * stride);
  float value = 0.f;
  if (bytes == 2) store_shared(address, uint16_t(0)), value = load_shared<uint16_t>(address);
  if (bytes == 4) store_shared(address, 0.f), value = load_shared<float>(address);
  if (bytes == 8) store_shared(address, float2{}), value = load_shared<float2>(address).x;
  if (bytes == 16) store_shared(address, float4{}), value = load_shared<float4>(address).x;
  store_global(result + lane_index(), value);
}

Tensor strided(const Tensor& like, int64_t stride, int64_t bytes) {
  Tensor result = empty(like, {32}, ScalarType::Float);
  check(launch<strided_kernel>(Shape{.shared_bytes = int(31 * stride + 16)}, nullptr, int(stride), int(bytes),
                               output<float>(result)));
  return result;
}

// Lane i of block b loads float i * stride; the sum of a warp's lanes by shuffles; one exp2.
__global__ void gather_kernel(const float* from, float* to, int stride) {
  float value = load_global(from + lane_index() * stride);
  value = warp_reduce<Add>(value);
  if (lane_index() == 0) store_global(to + block_index<0>(), exp2_approx(value));
}

Tensor gather(const Tensor& from, int64_t blocks, int64_t stride) {
  Tensor to = empty(from, {blocks}, ScalarType::Float);
  check(launch<gather_kernel>(Shape{.x = blocks}, nullptr, input<float>(from), output<float>(to), int(stride)));
  return to;
}

// The order in which threads pass a place, by a race on purpose: order (blocks * 64), to be run with races off.
__global__ void order_kernel(int32_t* count, int32_t* order) {
  for (int round = 0; round < 2; ++round) {
    const int32_t n = load_global_once(count);
    store_global(count, n + 1);
    store_global(order + n, int32_t(block_index<0>() * 64 + thread_index()));
    block_barrier();
  }
}

Tensor order(const Tensor& like, int64_t blocks) {
  Tensor count = empty(like, {1}, ScalarType::Int), result = empty(like, {blocks * 128}, ScalarType::Int);
  auto* counter = output<int32_t>(count);
  *emulator::host_pointer(counter) = 0;
  check(launch<order_kernel>(Shape{.x = blocks, .threads = 64}, nullptr, counter, output<int32_t>(result)));
  return result;
}

// ---- where tiles of gram_loss lie

// places (count, 2): row and column of the tiles from `first` on.
__global__ void places_kernel(int32_t* places, int first, int count) {
  const int index = int(block_index<0>()) * 256 + thread_index();
  if (index >= count) return;
  int row, column;
  triangle_place(first + index, row, column);
  store_global(places + 2 * index, int32_t(row));
  store_global(places + 2 * index + 1, int32_t(column));
}

Tensor places(const Tensor& like, int64_t first, int64_t count) {
  Tensor result = empty(like, {count, 2}, ScalarType::Int);
  const Shape shape{.x = (count + 255) / 256, .threads = 256};
  check(launch<places_kernel>(shape, nullptr, output<int32_t>(result), int(first), int(count)));
  return result;
}

// ---- what only a sanitizer sees
// ---------------------------------------------------------------------------------------------------

// 1: a read behind a local array; 2: signed overflow.
__global__ void unsound_kernel(const float* from, float* to, int size, int which) {
  volatile float local[32] = {};
  float value = load_global(from);
  if (which == 1) value = local[size + lane_index()];
  if (which == 2) value = float(size * 0x7ffffff + lane_index());
  store_global(to + lane_index(), value);
}

Tensor unsound(const Tensor& from, int64_t which) {
  Tensor to = empty(from, {32}, ScalarType::Float);
  check(launch<unsound_kernel>(Shape{}, nullptr, input<float>(from), output<float>(to), int(from.numel()), int(which)));
  return to;
}

}  // namespace
}  // namespace dinov3_ext

STABLE_TORCH_LIBRARY_FRAGMENT(dinov3_ext_probes, m) {
  m.def("interpret(Tensor program) -> Tensor");
  m.def("rotate(Tensor from_) -> Tensor");
  m.def("pipeline(Tensor from_) -> Tensor");
  m.def("reduce(Tensor from_) -> Tensor");
  m.def("faulty(Tensor read_only, Tensor(a!) writable, int mistake) -> ()");
  m.def("unwritten(Tensor like) -> Tensor");
  m.def("shape(Tensor like, int x, int y, int threads, int shared_bytes) -> ()");
  m.def("fragments(Tensor a, Tensor b, bool float16) -> Tensor");
  m.def("matrices(Tensor memory, Tensor addresses) -> Tensor");
  m.def("numbers(Tensor from_, int which) -> Tensor");
  m.def("strided(Tensor like, int stride, int bytes) -> Tensor");
  m.def("gather(Tensor from_, int blocks, int stride) -> Tensor");
  m.def("order(Tensor like, int blocks) -> Tensor");
  m.def("places(Tensor like, int first, int count) -> Tensor");
  m.def("unsound(Tensor from_, int which) -> Tensor");
}

#define PROBE(name) m.impl(#name, TORCH_BOX(&dinov3_ext::emulator::AsOperation<&dinov3_ext::name>::call))

STABLE_TORCH_LIBRARY_IMPL(dinov3_ext_probes, CPU, m) {
  PROBE(interpret);
  PROBE(rotate);
  PROBE(pipeline);
  PROBE(reduce);
  PROBE(faulty);
  PROBE(unwritten);
  PROBE(shape);
  PROBE(fragments);
  PROBE(matrices);
  PROBE(numbers);
  PROBE(strided);
  PROBE(gather);
  PROBE(order);
  PROBE(places);
  PROBE(unsound);
}
