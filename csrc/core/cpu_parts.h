// Products of floats on AMX tiles: a number is a sum of bf16 parts.
//
// A bf16 number is one part, an fp16 number two, an fp32 number three (8 bits of the mantissa each, rounded). Of the
// products of parts i and j those with i + j <= 2 are made: one for bf16 numbers, four for fp16, six for fp32; what is
// left out is below 2^-24 of the product. AMX takes subnormal bf16 for zero: an fp32 number below 2^-110 loses its last
// bits.
//
// Lines as in cpu_product.h, of 16 words: a word holds two numbers that are 16, not 1, apart along the contraction, the
// same on both sides: two vectors of floats become a line with three operations and no shuffle.
#pragma once

#include <cstring>

#include "core/cpu_amx.h"

#if defined(__x86_64__)
namespace dinov3_ext::parts {

using Float = Vector<16>::Float;
using Unsigned = Vector<16>::Unsigned;

constexpr int64_t kStep = 32;          // numbers along the contraction in a line
constexpr int64_t kTile = 16 * kLine;  // bytes
constexpr int kMostParts = 3;

// ---- numbers to parts ----

// The high half of each word: the bf16 number nearest to `value`; `value` keeps the rest.
DINOV3_EXT_INLINE Unsigned take_part(Float& value) {
  const Unsigned high = (bits_as<Unsigned>(value) + 0x8000u) & 0xffff0000u;
  value -= bits_as<Float>(high);
  return high;
}

// A line of each part, part p at line + p * part_stride: of the numbers `low` and, 16 further on, `high`.
template <int Parts>
DINOV3_EXT_INLINE void store_parts(Float low, Float high, char* line, int64_t part_stride) {
#pragma GCC unroll 3
  for (int part = 0; part < Parts; ++part) {
    const Unsigned words = take_part(low) >> 16 | take_part(high);
    std::memcpy(line + part * part_stride, &words, sizeof(words));
  }
}

// ---- products ----

// Tiles of one side: part p, step s, 16 rows or columns m at data + p * part_stride + s * step_stride + m * 16 * line.
struct Operand {
  const char* data;
  int64_t part_stride, step_stride;  // bytes
  int parts;
  int64_t line = kLine;  // bytes from one line of a tile to the next; a right side has kLine
};

struct PartProduct {
  Operand left, right;
  int64_t steps;
  char* result;        // row r, panel n: a line at result + r * row + n * panel
  int64_t row, panel;  // bytes
  bool add;            // to what `result` holds
};

// 16 or 32 rows and one or two panels of the result. Tiles 0 to 3: result; 4, 5: left; 6, 7: right.
template <int Rows, int Panels>
DINOV3_EXT_AMX inline void multiply_tiles(const PartProduct& given, int64_t row_tile, int64_t panel) {
  const int64_t row = given.row;
  char* result = given.result + row_tile * 16 * row + panel * given.panel;
  char *beside = result + given.panel, *below = result + 16 * row, *across = below + given.panel;
  const int64_t line = given.left.line;
  if (given.add) {
    _tile_loadd(0, result, row);
    if constexpr (Panels == 2) _tile_loadd(1, beside, row);
    if constexpr (Rows == 32) _tile_loadd(2, below, row);
    if constexpr (Rows == 32 && Panels == 2) _tile_loadd(3, across, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int sum = kMostParts - 1; sum >= 0; --sum) {  // the small products first
    for (int i = 0; i < given.left.parts; ++i) {
      const int j = sum - i;
      if (j < 0 || j >= given.right.parts) continue;
      const char* left = given.left.data + i * given.left.part_stride + row_tile * 16 * line;
      const char* right = given.right.data + j * given.right.part_stride + panel * kTile;
      for (int64_t s = 0; s < given.steps; ++s, left += given.left.step_stride, right += given.right.step_stride) {
        _tile_loadd(4, left, line);
        _tile_loadd(6, right, kLine);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (Panels == 2) {
          _tile_loadd(7, right + kTile, kLine);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (Rows == 32) {
          _tile_loadd(5, left + 16 * line, line);
          _tile_dpbf16ps(2, 5, 6);
          if constexpr (Panels == 2) _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
  }
  _tile_stored(0, result, row);
  if constexpr (Panels == 2) _tile_stored(1, beside, row);
  if constexpr (Rows == 32) _tile_stored(2, below, row);
  if constexpr (Rows == 32 && Panels == 2) _tile_stored(3, across, row);
}

// Row tiles [0, tiles) and panels [0, panels) of the result. Needs an AmxTiles alive on this thread.
DINOV3_EXT_AMX inline void multiply_panels(const PartProduct& given, int64_t tiles, int64_t panels) {
  for (int64_t panel = 0; panel < panels; panel += 2) {
    const bool two = panel + 1 < panels;
    int64_t tile = 0;
    for (; tile + 2 <= tiles; tile += 2) {
      if (two) {
        multiply_tiles<32, 2>(given, tile, panel);
      } else {
        multiply_tiles<32, 1>(given, tile, panel);
      }
    }
    if (tile == tiles) continue;
    if (two) {
      multiply_tiles<16, 2>(given, tile, panel);
    } else {
      multiply_tiles<16, 1>(given, tile, panel);
    }
  }
}

}  // namespace dinov3_ext::parts
#endif
