// The products of cpu_product.h on AMX: 16 lines of 64 bytes are one tile, a step multiplies 16 x 32 by 32 x 16 of
// bf16.
#pragma once

#include "core/cpu_product.h"

#if defined(__x86_64__)
namespace dinov3_ext {

struct alignas(64) Palette {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Palette) == 64);

// Configures this thread's eight tiles for as long as it lives, and leaves the configuration as it was found: PyTorch's
// own libraries keep theirs between calls.
class AmxTiles {
 public:
  DINOV3_EXT_AMX AmxTiles() {
    _tile_storeconfig(before_);
    static constexpr Palette palette;  // static: GCC 12 thinks that ldtilecfg reads 8 of the 64 bytes
    _tile_loadconfig(&palette);
  }
  DINOV3_EXT_AMX ~AmxTiles() {
    if (before_[0]) {
      _tile_loadconfig(before_);
    } else {
      _tile_release();
    }
  }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// (16 or 32) rows x (1 or 2) panels. Tiles 0 to 3: result; 4, 5: left; 6, 7: right. Tile numbers must be literals.
template <int Rows, int Panels>
DINOV3_EXT_AMX inline void multiply_tiles(const Product& product, int64_t row, int64_t panel) {
  constexpr int64_t kTile = 16 * kLine;
  char* result = product.result + panel * product.result_panel + row * kLine;
  char* next = result + product.result_panel;
  if (product.add) {
    _tile_loadd(0, result, kLine);
    if constexpr (Panels == 2) _tile_loadd(1, next, kLine);
    if constexpr (Rows == 32) _tile_loadd(2, result + kTile, kLine);
    if constexpr (Rows == 32 && Panels == 2) _tile_loadd(3, next + kTile, kLine);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const char* left = product.left + row * product.left_row;
  const char* right = product.right + panel * product.right_panel;
  for (int64_t k = 0; k < product.words; k += kLineWords, left += product.left_line, right += kTile) {
    _tile_loadd(4, left, product.left_row);
    _tile_loadd(6, right, kLine);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Panels == 2) {
      _tile_loadd(7, right + product.right_panel, kLine);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Rows == 32) {
      _tile_loadd(5, left + 16 * product.left_row, product.left_row);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Panels == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, result, kLine);
  if constexpr (Panels == 2) _tile_stored(1, next, kLine);
  if constexpr (Rows == 32) _tile_stored(2, result + kTile, kLine);
  if constexpr (Rows == 32 && Panels == 2) _tile_stored(3, next + kTile, kLine);
}

template <int Panels>
DINOV3_EXT_AMX inline void multiply_rows(const Product& product, int64_t panel) {
  int64_t row = 0;
  for (; row + 32 <= product.rows; row += 32) multiply_tiles<32, Panels>(product, row, panel);
  if (row < product.rows) multiply_tiles<16, Panels>(product, row, panel);
}

// Needs an AmxTiles alive on this thread.
DINOV3_EXT_AMX inline void multiply_amx(const Product& product) {
  int64_t panel = 0;
  for (; panel + 2 <= product.panels; panel += 2) multiply_rows<2>(product, panel);
  if (panel < product.panels) multiply_rows<1>(product, panel);
}

}  // namespace dinov3_ext
#endif
