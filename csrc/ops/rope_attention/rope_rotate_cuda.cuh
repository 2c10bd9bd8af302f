// Query and key of packed tokens rotated, and back again: limited by memory, 8 bytes per pair of 16-bit elements. A
// warp takes one token, so that its place in the rotary table is found once; a lane a pair of chunks E/2 apart, 16
// bytes each where the strides allow it, else single elements.
#pragma once

#include "core/element.cuh"
#include "core/rope.cuh"
#include "ops/rope_attention/rope_groups.cuh"

namespace dinov3_ext {

inline constexpr int kRotateWarps = 8;  // tokens of a block

// N: elements of a chunk; a quarter of the head width is a multiple of N.
template <Element E, int N, bool Inverse>
__global__ void __launch_bounds__(32 * kRotateWarps) rotate(RopeRotate args, GroupBlocks blocks) {
  using T = typename Storage<E>::Type;
  const RopePacked& packed = args.packed;
  const GroupBlock at = group_of(packed, blocks);
  const int tokens = at.group.tokens;
  const int64_t place = at.block * kRotateWarps + warp_index();  // token within the group
  if (place >= at.group.sequences * tokens) return;
  const int64_t sequence = place / tokens, token = at.group.first_token + place;
  const RopeGrid grid = load_rope_grid(packed.sequences, at.group.first_sequence + sequence);
  const RopeRows rows = rope_rows(grid, int(place - sequence * tokens), tokens);

  const int half = packed.head_width / 2, chunks = half / N, heads = packed.heads;
  const T* const input = static_cast<const T*>(args.input) + token * args.stride.token;
  T* const output = static_cast<T*>(args.output) + token * 2 * heads * packed.head_width;
  for (int item = lane_index(); item < 2 * heads * chunks; item += 32) {
    const int vector = item / chunks, first = (item - vector * chunks) * N;
    const int part = vector >= heads, head = vector - part * heads;
    const T* from = input + part * args.stride.part + head * args.stride.head + first;
    float low[N], high[N], cosine[N], sine[N];
    load_elements<E, N>(from, low);
    load_elements<E, N>(from + half, high);
    load_angles(cosine, sine, packed.rope, rows, first, packed.head_width / 4);
#pragma unroll
    for (int i = 0; i < N; ++i) turn<Inverse>(low[i], high[i], cosine[i], sine[i]);
    T* to = output + int64_t(vector) * packed.head_width + first;
    store_elements<E, N>(to, low);
    store_elements<E, N>(to + half, high);
  }
}

}  // namespace dinov3_ext
