// Matrix loads and products, one by one and a whole tile at a time: the same arithmetic in the same order, so that both
// give the same bits. Products are exact. Sums run over k in order by fused multiply-add in fp32, or, with
// `options.truncate`, as tensor cores do: eight products and the sum so far are added exactly and the result is cut off
// to fp32 towards zero (measured by Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores,
// PeerJ Computer Science 2021; the number of products and of guard bits depends on the generation): tests bound the
// error under both, they never ask for its bits.
#include <algorithm>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "emulator/primitives.h"

namespace dinov3_ext::emulator {
namespace {

typedef float Rows __attribute__((vector_size(64)));  // one column of 16 rows
typedef double DoubleRows __attribute__((vector_size(128)));
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
#if defined(__F16C__)
    _mm256_storeu_ps(to, _mm256_cvtph_ps(__builtin_bit_cast(__m128i, bits)));
#else
    for (int i = 0; i < 8; ++i) to[i] = widen_float16(bits[i]);
#endif
  }
}

template <Element E>
void widen_two(uint32_t both, float* low, float* high) {
  const float2 two = unpack<E>(both);
  *low = two.x, *high = two.y;
}

typedef float Four __attribute__((vector_size(16)));
typedef uint32_t FourWords __attribute__((vector_size(16)));

template <class Vector>
Vector load(const void* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class Vector>
void store(void* to, const Vector& value) {
  std::memcpy(to, &value, sizeof value);
}

void transpose(FourWords (&v)[4]) {
  const FourWords a = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5),
                  b = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
  const FourWords c = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5),
                  d = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
  v[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5), v[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  v[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5), v[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

// sums[n] += left[k] right(n, k) over k; left[k], sums[n]: columns of 16 rows, `stride` floats apart; right(n, k) =
// right[n * n_stride + k * k_stride].
template <int N>
void accumulate_some(float* sums, const float* left, const float* right, int k_count, int stride, int n_stride,
                     int k_stride) {
  Rows total[N];
  for (int j = 0; j < N; ++j) total[j] = load<Rows>(sums + j * stride);
  for (int k = 0; k < k_count; ++k) {
    const Rows column = load<Rows>(left + k * stride);
    for (int j = 0; j < N; ++j) total[j] += column * right[j * n_stride + k * k_stride];
  }
  for (int j = 0; j < N; ++j) store(sums + j * stride, total[j]);
}

// The same with eight products at a time, cut off towards zero. Sums of eight products of 16-bit numbers and one fp32
// are exact in double unless their exponents are 2^29 apart, where a tensor core drops the smaller ones too.
void accumulate_truncated(float* sums, const float* left, const float* right, int n_count, int k_count, int stride,
                          int n_stride, int k_stride) {
  for (int n = 0; n < n_count; ++n) {
    for (int k = 0; k < k_count; k += 8) {
      DoubleRows sum = __builtin_convertvector(load<Rows>(sums + n * stride), DoubleRows);
      for (int i = k; i < k + 8; ++i) {
        sum += __builtin_convertvector(load<Rows>(left + i * stride), DoubleRows) *
               double(right[n * n_stride + i * k_stride]);
      }
      for (int m = 0; m < 16; ++m) {
        const float nearest = float(sum[m]);
        const bool beyond = fabs(double(nearest)) > fabs(sum[m]) && fabsf(nearest) <= 0x1.fffffep127f;
        sums[n * stride + m] = beyond ? bits_to_float(float_to_bits(nearest) - 1) : nearest;
      }
    }
  }
}

// n_count is a multiple of 8, k_count of 16.
void accumulate(float* sums, const float* left, const float* right, int n_count, int k_count, int stride, int n_stride,
                int k_stride) {
  if (options.truncate) {
    return accumulate_truncated(sums, left, right, n_count, k_count, stride, n_stride, k_stride);
  }
  int n = 0;
  for (; n + 16 <= n_count; n += 16) {
    accumulate_some<16>(sums + n * stride, left, right + n * n_stride, k_count, stride, n_stride, k_stride);
  }
  if (n < n_count)
    accumulate_some<8>(sums + n * stride, left, right + n * n_stride, k_count, stride, n_stride, k_stride);
}

// Registers of four lanes whose rows follow each other lie in one column of the matrices below: 4 x 4 transposes.

// left[k][16 m + row], from a[m][k] of the lanes.
template <Element E>
void gather_left(float* left, const uint32_t* const (&a)[32], int left_tiles, int depth) {
  const int stride = 16 * left_tiles;
  for (int row = 0; row < 8; row += 4) {
    for (int j = 0; j < 4; ++j) {
      const uint32_t* lanes[4];
      for (int i = 0; i < 4; ++i) lanes[i] = a[4 * (row + i) + j];
      for (int m = 0; m < left_tiles; ++m) {
        for (int k = 0; k < depth; ++k) {
          FourWords v[4];
          for (int i = 0; i < 4; ++i) v[i] = load<FourWords>(lanes[i] + 4 * (m * depth + k));
          transpose(v);
          for (int q = 0; q < 4; ++q) {
            float* to = left + (16 * k + 2 * j + 8 * (q >> 1)) * stride + 16 * m + row + 8 * (q & 1);
            if constexpr (E == Element::bfloat16) {
              store(to, v[q] << 16), store(to + stride, v[q] & 0xffff0000u);
            } else {
#if defined(__F16C__)
              const FourWords packed = v[q] & 0xffffu, upper = v[q] >> 16;
              const auto narrow_both =
                  _mm_packus_epi32(__builtin_bit_cast(__m128i, packed), __builtin_bit_cast(__m128i, upper));
              const __m256 both = _mm256_cvtph_ps(narrow_both);
              _mm_storeu_ps(to, _mm256_castps256_ps128(both)),
                  _mm_storeu_ps(to + stride, _mm256_extractf128_ps(both, 1));
#else
              for (int i = 0; i < 4; ++i) widen_two<E>(v[q][i], to + i, to + stride + i);
#endif
            }
          }
        }
      }
    }
  }
}

// sums[n][16 m + row] from or to d[m][n] of the lanes.
template <bool Back>
void move_sums(float* sums, float* const (&d)[32], int left_tiles, int right_tiles) {
  const int stride = 16 * left_tiles;
  for (int row = 0; row < 8; row += 4) {
    for (int j = 0; j < 4; ++j) {
      float* lanes[4];
      for (int i = 0; i < 4; ++i) lanes[i] = d[4 * (row + i) + j];
      for (int m = 0; m < left_tiles; ++m) {
        for (int n = 0; n < right_tiles; ++n) {
          const int at = 4 * (m * right_tiles + n);
          float* const all = sums + (8 * n + 2 * j) * stride + 16 * m + row;
          float* const places[4] = {all, all + stride, all + 8, all + stride + 8};
          FourWords v[4];
          for (int i = 0; i < 4; ++i) v[i] = load<FourWords>(Back ? places[i] : lanes[i] + at);
          transpose(v);
          for (int i = 0; i < 4; ++i) store(Back ? lanes[i] + at : places[i], v[i]);
        }
      }
    }
  }
}

}  // namespace

// One matrix load: 32 lanes read 16 bytes each.
void Worker::read_lines(const uint32_t (&address)[32], const Location& at) {
  const int first = thread & ~31;
  ++counters.ldmatrix;
  counters.shared_read_bytes += 512;
  matrix_wavefronts(address);
  Moment now = moment(first);
  for (int i = 0; i < 32; ++i) {
    const uint32_t offset = address[i] - kSharedBase;
    now.thread = first + i;
    const bool fine = offset < shared_bytes && shared_bytes - offset >= 16 && offset % 16 == 0;
    if (fine && (!launch->races || shadow.read_again(offset, now, serial))) continue;
    check_shared(address[i], 16, /*write=*/false, first + i, at);
  }
}

void Worker::spread_matrices(const uint32_t (&address)[32], uint32_t* const (&r)[32], bool transposed,
                             const Location& at) {
  read_lines(address, at);
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

void Worker::product_of_registers(const char* word, Element element, int tiles, float* d, const uint32_t* a,
                                  const uint32_t* b, const Location& at) {
  struct Lane {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
  } lane{d, a, b};
  collective(word, lane, at, [&](Lane* const* lanes) {
    counters.mma += tiles;
    auto run = [&]<Element E>() {
      const uint32_t* left_registers[32];
      float* sums_registers[32];
      float left[16 * 16];
      right_.resize(size_t(tiles * 8 * 16)), sums_.resize(size_t(tiles * 8 * 16));
      for (int t = 0; t < 32; ++t) {
        left_registers[t] = lanes[t]->a, sums_registers[t] = lanes[t]->d;
        for (int n = 0; n < tiles; ++n) {
          for (int q = 0; q < 2; ++q) {  // right[output][k]
            float* to = right_.data() + (8 * n + t / 4) * 16 + 2 * (t % 4) + 8 * q;
            widen_two<E>(lanes[t]->b[2 * n + q], to, to + 1);
          }
        }
      }
      gather_left<E>(left, left_registers, 1, 1);
      move_sums<false>(sums_.data(), sums_registers, 1, tiles);
      accumulate(sums_.data(), left, right_.data(), 8 * tiles, 16, 16, 16, 1);
      move_sums<true>(sums_.data(), sums_registers, 1, tiles);
    };
    element == Element::bfloat16 ? run.template operator()<Element::bfloat16>()
                                 : run.template operator()<Element::float16>();
  });
}

void Worker::product(Element element, bool transposed, int left_tiles, int right_tiles, int depth,
                     float* const (&d)[32], const uint32_t* const (&a)[32], const uint32_t (*addresses)[32],
                     const Location& at) {
  auto run = [&]<Element E>() {
    const int outputs = 8 * right_tiles, products = 16 * depth, rows = 16 * left_tiles;
    counters.mma += left_tiles * right_tiles * depth;
    left_.resize(size_t(products * rows)), right_.resize(size_t(outputs * products));
    sums_.resize(size_t(outputs * rows));
    // right(n, k): lines of eight elements as they lie in shared memory, along k or (transposed) along n.
    const int n_stride = transposed ? 1 : products, k_stride = transposed ? outputs : 1;
    for (int k = 0; k < depth; ++k) {
      for (int n = 0; n < right_tiles; n += 2, ++addresses) {
        read_lines(*addresses, at);
        for (int t = 0; t < 32; ++t) {
          const int line = t & 7, b = t >> 3 & 1, of_pair = t >> 4;  // matrix 2 of_pair + b is b[b] of tile n + of_pair
          const int output = 8 * (n + of_pair) + (transposed ? 0 : line);
          const int product = 16 * k + 8 * b + (transposed ? line : 0);
          widen_eight<E>(shared_at((*addresses)[t]), right_.data() + output * n_stride + product * k_stride);
        }
      }
    }
    gather_left<E>(left_.data(), a, left_tiles, depth);
    move_sums<false>(sums_.data(), d, left_tiles, right_tiles);
    for (int m = 0; m < left_tiles; ++m) {
      accumulate(sums_.data() + 16 * m, left_.data() + 16 * m, right_.data(), outputs, products, rows, n_stride,
                 k_stride);
    }
    move_sums<true>(sums_.data(), d, left_tiles, right_tiles);
  };
  element == Element::bfloat16 ? run.template operator()<Element::bfloat16>()
                               : run.template operator()<Element::float16>();
}

}  // namespace dinov3_ext::emulator
