// Matrix loads and products, one by one and a whole tile at a time: the same arithmetic in the same order, so that both
// give the same bits. Products are exact in fp32, sums run over k in order by fused multiply-add. (A tensor core sums
// in an order and with a rounding of its own: tests bound the error, they never ask for its bits.)
#include <cstring>

#include "emulator/primitives.h"

namespace dinov3_ext::emulator {
namespace {

typedef float Rows __attribute__((vector_size(64)));  // one column of 16 rows
typedef uint16_t Eight16 __attribute__((vector_size(16)));
typedef uint32_t Eight32 __attribute__((vector_size(32)));

// Eight 16-bit elements as floats.
template <Element E>
void widen_eight(const uint8_t* from, float* to) {
  Eight16 bits;
  std::memcpy(&bits, from, 16);
  if constexpr (E == Element::bfloat16) {
    const Eight32 wide = __builtin_convertvector(bits, Eight32) << 16;
    std::memcpy(to, &wide, 32);
  } else {
    for (int i = 0; i < 8; ++i) to[i] = widen_float16(bits[i]);
  }
}

template <Element E>
void widen_two(uint32_t both, float* low, float* high) {
  const float2 two = unpack<E>(both);
  *low = two.x, *high = two.y;
}

// sums[n] += left[k] right(n, k) over k; left[k], sums[n]: columns of 16 rows, `left_stride` and `sum_stride` floats
// apart; right(n, k) = right[n * n_stride + k * k_stride]. n_count is a multiple of 8.
void accumulate(float* sums, const float* left, const float* right, int n_count, int k_count, int sum_stride,
                int left_stride, int n_stride, int k_stride) {
  for (int n = 0; n < n_count; n += 8) {
    Rows total[8];
    for (int j = 0; j < 8; ++j) std::memcpy(&total[j], sums + (n + j) * sum_stride, sizeof(Rows));
    const float* row = right + n * n_stride;
    for (int k = 0; k < k_count; ++k) {
      Rows column;
      std::memcpy(&column, left + k * left_stride, sizeof(Rows));
      for (int j = 0; j < 8; ++j) total[j] += column * row[j * n_stride + k * k_stride];
    }
    for (int j = 0; j < 8; ++j) std::memcpy(sums + (n + j) * sum_stride, &total[j], sizeof(Rows));
  }
}

}  // namespace

// Passes over the banks: four phases of eight rows; a row takes four neighbouring banks.
void Worker::matrix_wavefronts(const uint32_t (&address)[32]) {
  for (int phase = 0; phase < 4; ++phase) {
    const uint32_t* rows = address + 8 * phase;
    uint32_t groups = 0;
    for (int i = 0; i < 8; ++i) groups |= 1u << (rows[i] >> 4 & 7);
    int passes = 1;
    if (groups != 0xff) {
      int of_group[8] = {};
      for (int i = 0; i < 8; ++i) {
        bool again = false;  // the same row twice is one access
        for (int j = 0; j < i; ++j) again |= rows[j] == rows[i];
        if (!again) passes = std::max(passes, ++of_group[rows[i] >> 4 & 7]);
      }
    }
    counters.wavefronts += passes;
    counters.bank_conflicts += passes - 1;
  }
}

void Worker::spread_matrices(const uint32_t (&address)[32], uint32_t* const (&r)[32], bool transposed,
                             const Location& at) {
  const int first = thread & ~31;
  for (int i = 0; i < 32; ++i) check_shared(address[i], 16, /*write=*/false, first + i, at);
  ++counters.ldmatrix;
  counters.shared_read_bytes += 512;
  matrix_wavefronts(address);
  for (int j = 0; j < 4; ++j) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], shared_at(address[8 * j + i]), 16);
    for (int t = 0; t < 32; ++t) {
      const int row = t / 4, column = 2 * (t % 4);
      r[t][j] = transposed ? matrix[column][row] | uint32_t(matrix[column + 1][row]) << 16
                           : matrix[row][column] | uint32_t(matrix[row][column + 1]) << 16;
    }
  }
}

void Worker::load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed, const Location& at) {
  struct Lane {
    uint32_t* r;
    uint32_t address;
  } lane{r, address};
  collective(transposed ? "load_matrices_transposed" : "load_matrices", lane, at, [&](Lane* const* lanes) {
    uint32_t addresses[32];
    uint32_t* registers[32];
    for (int t = 0; t < 32; ++t) addresses[t] = lanes[t]->address, registers[t] = lanes[t]->r;
    spread_matrices(addresses, registers, transposed, at);
  });
}

void Worker::load_tile(TileLoad& lane, int matrices, const Location& at) {
  collective("load_left", lane, at, [&](TileLoad* const* lanes) {
    for (int i = 0; i < matrices; ++i) {
      uint32_t addresses[32];
      uint32_t* registers[32];
      for (int t = 0; t < 32; ++t) addresses[t] = lanes[t]->addresses[i], registers[t] = lanes[t]->r[i];
      spread_matrices(addresses, registers, /*transposed=*/false, at);
    }
  });
}

namespace {

// left[k][16 m + row], from a[m][k] of the lanes.
template <Element E>
void gather_left(float* left, const uint32_t* const (&a)[32], int left_tiles, int depth) {
  const int stride = 16 * left_tiles;
  for (int t = 0; t < 32; ++t) {
    for (int m = 0; m < left_tiles; ++m) {
      for (int k = 0; k < depth; ++k) {
        for (int q = 0; q < 4; ++q) {
          float* to = left + (16 * k + 2 * (t % 4) + 8 * (q >> 1)) * stride + 16 * m + t / 4 + 8 * (q & 1);
          widen_two<E>(a[t][(m * depth + k) * 4 + q], to, to + stride);
        }
      }
    }
  }
}

// sums[n][16 m + row] from or to d[m][n] of the lanes.
template <bool Back>
void move_sums(float* sums, float* const (&d)[32], int left_tiles, int right_tiles) {
  const int stride = 16 * left_tiles;
  for (int t = 0; t < 32; ++t) {
    for (int m = 0; m < left_tiles; ++m) {
      for (int n = 0; n < right_tiles; ++n) {
        float* lane = d[t] + (m * right_tiles + n) * 4;
        float* all = sums + (8 * n + 2 * (t % 4)) * stride + 16 * m + t / 4;
        if constexpr (Back) {
          lane[0] = all[0], lane[1] = all[stride], lane[2] = all[8], lane[3] = all[stride + 8];
        } else {
          all[0] = lane[0], all[stride] = lane[1], all[8] = lane[2], all[stride + 8] = lane[3];
        }
      }
    }
  }
}

}  // namespace

void Worker::multiply_add(Element element, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                          const Location& at) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } lane{d, a, {b0, b1}};
  collective("multiply_add", lane, at, [&](Lane* const* lanes) {
    ++counters.mma;
    auto run = [&]<Element E>() {
      const uint32_t* left_registers[32];
      float* sums_registers[32];
      float left[16 * 16], right[16 * 8], sums[8 * 16];
      for (int t = 0; t < 32; ++t) {
        left_registers[t] = lanes[t]->a, sums_registers[t] = lanes[t]->d;
        for (int q = 0; q < 2; ++q) {  // right[n][k]
          float* to = right + (t / 4) * 16 + 2 * (t % 4) + 8 * q;
          widen_two<E>(lanes[t]->b[q], to, to + 1);
        }
      }
      gather_left<E>(left, left_registers, 1, 1);
      move_sums<false>(sums, sums_registers, 1, 1);
      accumulate(sums, left, right, 8, 16, 16, 16, 16, 1);
      move_sums<true>(sums, sums_registers, 1, 1);
    };
    element == Element::bfloat16 ? run.template operator()<Element::bfloat16>()
                                 : run.template operator()<Element::float16>();
  });
}

void Worker::product(TileProduct& lane, Element element, bool transposed, int left_tiles, int right_tiles, int depth,
                     const Location& at) {
  collective(transposed ? "product_with_columns" : "product_with_rows", lane, at, [&](TileProduct* const* lanes) {
    auto run = [&]<Element E>() {
      const int outputs = 8 * right_tiles, products = 16 * depth, rows = 16 * left_tiles, first = thread & ~31;
      counters.mma += left_tiles * right_tiles * depth;
      counters.ldmatrix += depth * right_tiles / 2;
      counters.shared_read_bytes += 512 * (depth * right_tiles / 2);
      left_.resize(size_t(products * rows)), right_.resize(size_t(outputs * products));
      sums_.resize(size_t(outputs * rows));
      // right(n, k): lines of eight elements as they lie in shared memory, along k or (transposed) along n.
      const int n_stride = transposed ? 1 : products, k_stride = transposed ? outputs : 1;
      for (int k = 0; k < depth; ++k) {
        for (int n = 0; n < right_tiles; n += 2) {
          uint32_t addresses[32];
          for (int t = 0; t < 32; ++t) {
            addresses[t] = lanes[t]->addresses[(k * right_tiles + n) / 2];
            check_shared(addresses[t], 16, /*write=*/false, first + t, at);
            const int line = t & 7, b = t >> 3 & 1,
                      of_pair = t >> 4;  // matrix 2 of_pair + b is b[b] of tile n + of_pair
            const int output = 8 * (n + of_pair) + (transposed ? 0 : line);
            const int product = 16 * k + 8 * b + (transposed ? line : 0);
            widen_eight<E>(shared_at(addresses[t]), right_.data() + output * n_stride + product * k_stride);
          }
          matrix_wavefronts(addresses);
        }
      }
      const uint32_t* a[32];
      float* d[32];
      for (int t = 0; t < 32; ++t) a[t] = lanes[t]->a, d[t] = lanes[t]->d;
      gather_left<E>(left_.data(), a, left_tiles, depth);
      move_sums<false>(sums_.data(), d, left_tiles, right_tiles);
      for (int m = 0; m < left_tiles; ++m) {
        accumulate(sums_.data() + 16 * m, left_.data() + 16 * m, right_.data(), outputs, products, rows, rows, n_stride,
                   k_stride);
      }
      move_sums<true>(sums_.data(), d, left_tiles, right_tiles);
    };
    element == Element::bfloat16 ? run.template operator()<Element::bfloat16>()
                                 : run.template operator()<Element::float16>();
  });
}

}  // namespace dinov3_ext::emulator
